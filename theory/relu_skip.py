"""Section 8.2: when a skip connection can be absorbed into a ReLU MLP, W₂ReLU(W₁x) + x = V₂ReLU(V₁x) for all x.

The paper multiplies column vectors from the left here: W1 is (m, h), W2 is (h, m), which is how nn.Linear stores
`c_fc.weight` and `c_proj.weight`. x is (..., h). An index set J is a boolean mask (m,). In place of the skip I any
non-zero matrix Z (h, h) may stand, as in Corollary 8.3.1: W₂ReLU(W₁x) + Zx; None is I. m need not be 4h anywhere.

How much of Theorem 8.3 is so. J ⇒ V: always, and no rank is needed. V ⇒ J: only if every neuron makes a kink of its
own, that is no row of W₁ is zero or parallel to another and no column of W₂ is zero. The proof takes this from 'the
kinks must be identical', but a dead neuron, or two that cancel each other's kink, leave V room that W does not use:
with W₁ and W₂ of rank h and h dead neurons, V always exists (`widened`), and J hardly ever does.
"""

from typing import NamedTuple

import torch

PARALLEL = 1e-12  # two rows are parallel when 1 − |cos| is below this


def relu_mlp(x, W1, W2, Z=None):
    """W₂ReLU(W₁x) + Zx for x (..., h); Z None: no skip."""
    y = torch.relu(x @ W1.T) @ W2.T
    return y if Z is None else y + x @ Z.T


def subset_product(W1, W2, J):
    """W₂[:, J] W₁[J, :], (h, h), for a mask J (m,)."""
    return W2[:, J] @ W1[J]


def theorem_8_3(W1, W2, J, Z=None, tol=1e-9):
    """V₁ (m, h) and V₂ (h, m) of Theorem 8.3: W₁ with the rows in J negated, and W₂ itself.

    Raises ValueError unless W₂[:, J]W₁[J, :] = −Z to tol, next to the largest entry of Z.
    """
    Z = identity_like(W1) if Z is None else Z
    off = (subset_product(W1, W2, J) + Z).abs().max().item() / Z.abs().max().item()
    if not off <= tol:
        raise ValueError(f"W₂[:, J]W₁[J, :] is not −Z: the relative difference is {off:.3g}; find_subset looks for a J")
    return torch.where(J.unsqueeze(-1), -W1, W1), W2.clone()


def widened(W1, W2, Z=None):
    """V₁ (m + h, h) and V₂ (h, m + h) that absorb the skip with h more neurons, for any W₁ of rank h.

    For h independent rows S of W₁, Zx = A(W₁[S]x) with A = Z W₁[S]⁻¹, and y = ReLU(y) − ReLU(−y). Not in the paper,
    which keeps the width; for an invertible Z and almost every W, fewer do not suffice. Raises ValueError for a lower
    rank.
    """
    Z = identity_like(W1) if Z is None else Z
    h = W1.shape[1]
    S = independent_rows(W1)
    if len(S) < h:
        raise ValueError(f"W₁ has rank {len(S)}, below its width {h}; a skip needs 2h neurons of its own then")
    A = torch.linalg.solve(W1[S], Z, left=False)
    V2 = W2.clone()
    V2[:, S] += A
    return torch.cat((W1, -W1[S])), torch.cat((V2, -A), dim=1)


def absorption_gap(x, W1, W2, V1, V2, Z=None):
    """The largest |W₂ReLU(W₁x) + Zx − V₂ReLU(V₁x)| over x (..., h), next to the largest entry of the former."""
    target = relu_mlp(x, W1, W2, identity_like(W1) if Z is None else Z)
    return ((relu_mlp(x, V1, V2) - target).abs().max() / target.abs().max()).item()


class Search(NamedTuple):
    """What find_subset found: a mask J (m,) or None; whether None means that there is none; why, in words."""

    subset: torch.Tensor | None
    exhaustive: bool
    reason: str


def find_subset(W1, W2, Z=None, tol=1e-9, max_free=20):
    """A J with W₂[:, J]W₁[J, :] = −Z (to tol, next to the largest entry of Z), as a Search.

    J is a 0-1 solution b of the linear equations Σ_i b_i W₂[:, i]W₁[i, :] = −Z: h² equations, m unknowns. Where these
    rank-one matrices are linearly independent (most W with m ≤ h², so 4h neurons from h = 4 on) the one real solution
    decides, at any m. Otherwise, with k = m − rank, k entries of b determine the others, and their 2^k values are all
    tried: exact for k ≤ max_free (m ≤ max_free will always do), and above it the search gives up and says so. In
    general this is a subset-sum problem, so no method is fast for every W.
    Where h² > 2m, 2m random combinations stand for the equations. A J solves those too, and what is found is checked
    on W itself, so they can cost time (a larger k) but never a wrong answer. In floating point the answer is about J's
    that solve the equations to rounding.
    """
    Z = identity_like(W1) if Z is None else Z
    h, m = W2.shape
    K, target = subset_equations(W1, W2, Z, min(h * h, 2 * m))
    U, S, Vt = torch.linalg.svd(K, full_matrices=True)
    rank = int((S > 1e-8 * S.max()).sum())  # what is taken for null is tried, so a generous bound loses nothing
    coordinates = (U[:, :rank].T @ target) / S[:rank]
    b, null = Vt[:rank].T @ coordinates, Vt[rank:].T  # every real solution is b + null t
    if (K @ b - target).abs().max() > 1e-6 * S.max():
        return Search(None, True, "−Z is no linear combination of the neurons' rank-one matrices, so there is no J")
    free = m - rank
    if free > max_free:
        return Search(None, False, f"gave up: {free} entries of J are free, 2^{free} cases (the limit is {max_free})")
    pivots = independent_rows(null) if free else []
    from_bits = null @ torch.linalg.inv(null[pivots]) if free else null
    for first in range(0, 2**free, 4096):
        cases = torch.arange(first, min(first + 4096, 2**free))
        bits = (cases.unsqueeze(-1) >> torch.arange(free) & 1).to(b)
        solutions = b + (bits - b[pivots]) @ from_bits.T  # (cases, m)
        near = ((solutions - solutions.round()).abs().amax(-1) < 1e-4) & ((solutions > -0.5) & (solutions < 1.5)).all(
            -1
        )
        for J in solutions[near].round().bool():
            if (subset_product(W1, W2, J) + Z).abs().max() <= tol * Z.abs().max():
                return Search(J, True, f"found, |J| = {int(J.sum())}")
    return Search(None, True, f"none of the 2^{free} candidates is a J")


def subset_equations(W1, W2, Z, n, seed=0):
    """n equations K b = target, (n, m) and (n,), that every J's 0-1 vector b solves; n = h²: all, entry by entry.

    Fewer: random bilinear forms pᵀ(Σ_i b_i W₂[:, i]W₁[i, :])q = −pᵀZq, with which h² rows need not be formed.
    """
    h, m = W2.shape
    if n == h * h:
        return torch.einsum("im,mj->ijm", W2, W1).reshape(n, m), -Z.reshape(n)
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, n, h, generator=generator, dtype=torch.float64).to(W1)
    return (p @ W2) * (q @ W1.T), -((p @ Z) * q).sum(-1)


def live(W1, W2):
    """The neurons (m,) that do something: row of W₁ and column of W₂ both not zero."""
    return (W1 != 0).any(-1) & (W2 != 0).any(0)


def parallel_rows(W1):
    """(m, m): the cosine's sign for each pair of parallel rows of W₁ (all rows not zero), 0 for the other pairs."""
    rows = torch.nn.functional.normalize(W1, dim=-1)
    cosine = rows @ rows.T
    return torch.where(1 - cosine.abs() < PARALLEL, cosine.sign(), 0.0)


def distinct_kinks(W1, W2):
    """Theorem 8.3's unstated assumption: no row of W₁ is zero or parallel to another, no column of W₂ is zero.

    Each neuron then makes a kink of its own, and V has to have the same m hyperplanes, each once.
    """
    return bool(live(W1, W2).all()) and parallel_rows(W1).abs().sum().item() == len(W1)


def merged(W1, W2):
    """The same MLP with no dead neuron, and with neurons whose rows of W₁ differ by a positive factor made one."""
    keep = live(W1, W2)
    W1, W2 = W1[keep], W2[:, keep]
    first = (parallel_rows(W1) > 0).to(torch.uint8).argmax(-1)  # the neuron that each goes into
    factors = W1.norm(dim=-1) / W1[first].norm(dim=-1)
    into = torch.nn.functional.one_hot(first, len(W1)).to(W1)
    W2 = (W2 * factors) @ into
    keep = (first == torch.arange(len(W1))) & (W2 != 0).any(0)
    return W1[keep], W2[:, keep]


class Absorption(NamedTuple):
    """Whether V exists (None: undecided), V₁ and V₂ where it was constructed, and why, in words."""

    exists: bool | None
    V1: torch.Tensor | None
    V2: torch.Tensor | None
    reason: str


def absorb(W1, W2, Z=None, max_free=20):
    """Whether W₂ReLU(W₁x) + Zx = V₂ReLU(V₁x) has a solution with V₁, V₂ of W's shapes: an Absorption.

    Yes: there is a J, or merging and dropping neurons frees the h that `widened` needs. No: there is no J, and Theorem
    8.3's necessity applies (`distinct_kinks`). Undecided: the search gave up, or it does not apply.
    """
    m, h = W1.shape
    search = find_subset(W1, W2, Z, max_free=max_free)
    if search.subset is not None:
        return Absorption(True, *theorem_8_3(W1, W2, search.subset, Z), f"Theorem 8.3: {search.reason}")
    if distinct_kinks(W1, W2):
        return Absorption(False if search.exhaustive else None, None, None, search.reason)
    small1, small2 = merged(W1, W2)
    spare = m - len(small1)
    if spare >= h and len(independent_rows(small1)) == h:
        V1, V2 = widened(small1, small2, Z)
        rest = m - len(V1)
        V1, V2 = torch.cat((V1, V1.new_zeros(rest, h))), torch.cat((V2, V2.new_zeros(h, rest)), dim=1)
        return Absorption(True, V1, V2, f"no use of J: {spare} neurons do nothing of their own, and {h} are enough")
    reason = "neurons share kinks or make none, so V may exist without a J (the 'only if' of Theorem 8.3 fails here)"
    return Absorption(None, None, None, f"{search.reason}; {reason}")


def planted_instance(h, size, generator, m=None, Z=None):
    """Random W₁, W₂ and a random J of the given size with W₂[:, J]W₁[J, :] = −Z, float64; m None: 4h.

    W₂[:, J] is moved by the least amount that gives the equation. Raises ValueError for a size outside [h, m].
    """
    m = 4 * h if m is None else m
    if not h <= size <= m:
        raise ValueError(f"a J has at least h = {h} and at most m = {m} elements, not {size}")
    W1, W2 = random_mlp(h, m, generator)
    J = torch.zeros(m, dtype=torch.bool)
    J[torch.randperm(m, generator=generator)[:size]] = True
    Z = identity_like(W1) if Z is None else Z
    W2[:, J] -= (subset_product(W1, W2, J) + Z) @ torch.linalg.pinv(W1[J])
    return W1, W2, J


def random_mlp(h, m, generator):
    """W₁ (m, h) with entries N(0, 1/h) and W₂ (h, m) with entries N(0, 1/m), float64."""
    W1 = torch.randn(m, h, generator=generator, dtype=torch.float64) / h**0.5
    return W1, torch.randn(h, m, generator=generator, dtype=torch.float64) / m**0.5


def corollary_8_3_1(h, n, generator, m=None):
    """How often, of n random (W₁, W₂, Z, Z'), some (W'₁, W'₂) has φ_{W₁,W₂,Z} = φ_{W'₁,W'₂,Z'}: (yes, no, undecided).

    The maps are equal for some W' if and only if W absorbs Z − Z', so 'no' is expected n times. What is so: for each
    pair Z' ≠ Z, for almost every (W₁, W₂), no W' exists, because each J asks for a polynomial equation in W. The
    corollary puts the quantifiers the other way round (for almost every W, for every such Z'), and that is false for
    every W: `corollary_8_3_1_exception` gives a Z' and W' for each J. For almost every W these at most 2^m matrices
    Z' are all there are.
    """
    answers = []
    for _ in range(n):
        W1, W2 = random_mlp(h, 4 * h if m is None else m, generator)
        Z, other = torch.randn(2, h, h, generator=generator, dtype=torch.float64)
        answers.append(absorb(W1, W2, Z - other).exists)
    return answers.count(True), answers.count(False), answers.count(None)


def corollary_8_3_1_exception(W1, W2, Z, J):
    """(W'₁, W'₂, Z') with φ_{W₁,W₂,Z} = φ_{W'₁,W'₂,Z'} and Z − Z' = −W₂[:, J]W₁[J, :], for any mask J (m,).

    For most W that difference is invertible when |J| ≥ h, so this contradicts Corollary 8.3.1 as stated. With J
    everything it is ReLU(y) = y + ReLU(−y).
    """
    W1_new = torch.where(J.unsqueeze(-1), -W1, W1)
    return W1_new, W2.clone(), Z + subset_product(W1, W2, J)


def independent_rows(M):
    """Indices of a largest set of linearly independent rows of M (n, k), by Gram-Schmidt with pivoting; a list."""
    M, chosen = M.clone(), []
    bound = 1e-8 * M.abs().max().item() if M.numel() else 0.0
    for _ in range(min(M.shape)):
        lengths = M.norm(dim=-1)
        i = int(lengths.argmax())
        if lengths[i] <= bound:
            break
        chosen.append(i)
        direction = M[i] / lengths[i]
        M -= torch.outer(M @ direction, direction)
    return chosen


def identity_like(W1):
    """I of the width of W₁ (m, h)."""
    return torch.eye(W1.shape[1], dtype=W1.dtype, device=W1.device)
