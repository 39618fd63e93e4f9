"""Section 8.2: when an MLP can absorb its skip connection, W₂ReLU(W₁x) + x = V₂ReLU(V₁x) for all x, and for which MLPs.

Here the paper multiplies column vectors from the left: W1 is (m, h) and W2 is (h, m), the shapes in which nn.Linear
stores `c_fc.weight` and `c_proj.weight`; x is (..., h). An index set J is a boolean mask (m,). Any non-zero matrix Z
(h, h) can take the place of the skip I, as in Corollary 8.3.1: W₂ReLU(W₁x) + Zx; Z=None means I. m can be any width,
not only 4h.

What is true of Theorem 8.3: J ⇒ V holds always, and needs no assumption on the ranks. V ⇒ J holds only if each neuron
has a kink of its own: no row of W₁ is zero or parallel to another, and no column of W₂ is zero. The proof takes this
for granted where it says that the kinks must be identical. But dead neurons, or neurons with the same kink, leave V
more freedom than W uses: with W₁ and W₂ of rank h and h dead neurons V always exists (`widened`), and J almost never
does.

Other activations (arXiv 2604.23705): J ⇒ V, with the same V, needs of ReLU that f(u) − f(−u) = u, and GELU, its tanh
approximation and SiLU have that, too (`ABSORBING`): f(u) = u/2 + e(u) with an even e. V ⇒ J holds for these three if no
row of W₁ is zero or ± another, and no column of W₂ is zero, which is less than ReLU needs. Their |u|/2 − e(u) falls off
faster the longer the row, so that e(w₁·x), e(w₂·x), … and the linear functions are independent unless two w are equal
up to sign: V then has the rows of W₁ up to sign, with the columns of W₂, and the rows with other signs are J. Squared
ReLU and gated MLPs, W₂(f(W₁x) ⊙ W₃x), absorb no skip, whatever their weights: their derivative at x = 0 is zero, and
that of a skip Zx is Z (`derivative_at_zero`).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

PARALLEL = 1e-12  # two rows count as parallel if 1 − |cos| is below this
ABSORBING = {  # the activations with f(u) − f(−u) = u
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def mlp(x, W1, W2, Z=None, activation=torch.relu):
    """W₂f(W₁x) + Zx for x (..., h) and the activation f; here Z=None means no skip."""
    y = activation(x @ W1.T) @ W2.T
    return y if Z is None else y + x @ Z.T


def gated_mlp(x, W1, W3, W2, activation=F.silu):
    """W₂(f(W₁x) ⊙ W₃x) for x (..., h), W1 and W3 (m, h): SwiGLU, or with other activations GeGLU and ReGLU."""
    return (activation(x @ W1.T) * (x @ W3.T)) @ W2.T


def derivative_at_zero(function, h):
    """The Jacobian (h, h) of function, (h,) to (h,) in float64, at 0: Z for a skip connection Zx beside it.

    Where that of an MLP is zero for all weights, W₂f(W₁x) + Zx = V₂f(V₁x) has no solution for any Z but 0.
    """
    return torch.autograd.functional.jacobian(function, torch.zeros(h, dtype=torch.float64))


def subset_product(W1, W2, J):
    """W₂[:, J] W₁[J, :], (h, h), for a mask J (m,)."""
    return W2[:, J] @ W1[J]


def theorem_8_3(W1, W2, J, Z=None, tol=1e-9):
    """V₁ (m, h) and V₂ (h, m) of Theorem 8.3: W₁ with the rows in J negated, and W₂ itself; for all of `ABSORBING`.

    tol: relative to the largest entry of Z. Raises ValueError unless W₂[:, J]W₁[J, :] = −Z within tol.
    """
    Z = identity_like(W1) if Z is None else Z
    off = (subset_product(W1, W2, J) + Z).abs().max().item() / Z.abs().max().item()
    if not off <= tol:
        raise ValueError(
            f"W₂[:, J]W₁[J, :] must equal −Z, but the relative difference is {off:.3g}: find_subset searches for a J"
        )
    return torch.where(J.unsqueeze(-1), -W1, W1), W2.clone()


def widened(W1, W2, Z=None):
    """V₁ (m + h, h) and V₂ (h, m + h), which absorb the skip with h additional neurons, for any W₁ of rank h.

    For h independent rows S of W₁, Zx = A(W₁[S]x) with A = Z W₁[S]⁻¹, and y = f(y) − f(−y). Not in the paper,
    which keeps the width; for an invertible Z and almost every W, fewer than h neurons are not enough. Raises
    ValueError if the rank of W₁ is below h.
    """
    Z = identity_like(W1) if Z is None else Z
    h = W1.shape[1]
    S = independent_rows(W1)
    if len(S) < h:
        raise ValueError(f"W₁ must have rank h={h}, got rank {len(S)}: the skip then needs 2h neurons of its own")
    A = torch.linalg.solve(W1[S], Z, left=False)
    V2 = W2.clone()
    V2[:, S] += A
    return torch.cat((W1, -W1[S])), torch.cat((V2, -A), dim=1)


def absorption_gap(x, W1, W2, V1, V2, Z=None, activation=torch.relu):
    """The largest |W₂f(W₁x) + Zx − V₂f(V₁x)| over x (..., h), divided by the largest |W₂f(W₁x) + Zx|."""
    target = mlp(x, W1, W2, identity_like(W1) if Z is None else Z, activation)
    return ((mlp(x, V1, V2, activation=activation) - target).abs().max() / target.abs().max()).item()


class Search(NamedTuple):
    """What `find_subset` found."""

    subset: torch.Tensor | None  # a mask J (m,)
    exhaustive: bool  # whether subset=None means that there is no J
    reason: str  # in words


def find_subset(W1, W2, Z=None, tol=1e-9, max_free=20):
    """Search for a J with W₂[:, J]W₁[J, :] = −Z (within tol, relative to the largest entry of Z); returns a Search.

    J is a 0-1 solution b of the linear equations Σ_i b_i W₂[:, i]W₁[i, :] = −Z: h² equations, m unknowns. If these
    rank-one matrices are linearly independent (almost every W with m ≤ h², so m = 4h for h ≥ 4), the only real solution
    decides, at any m. Otherwise, with k = m − rank, k entries of b determine the others, and all their 2^k values are
    tried. That is exact for k ≤ max_free (always, if m ≤ max_free); for a larger k the search gives up and says so. In
    general this is a subset-sum problem, so no method is fast for every W.
    If h² > 2m, 2m random combinations of the equations are used instead. Every J solves them, too, and each solution is
    checked on W itself, so they can cost time (a larger k) but never give a wrong answer. In floating point the answer
    is about sets J that solve the equations up to rounding.
    """
    Z = identity_like(W1) if Z is None else Z
    h, m = W2.shape
    K, target = subset_equations(W1, W2, Z, min(h * h, 2 * m))
    U, S, Vt = torch.linalg.svd(K, full_matrices=True)
    rank = int((S > 1e-8 * S.max()).sum())  # generous: directions taken for null are tried
    coordinates = (U[:, :rank].T @ target) / S[:rank]
    b, null = Vt[:rank].T @ coordinates, Vt[rank:].T  # every real solution is b + null t
    if (K @ b - target).abs().max() > 1e-6 * S.max():
        return Search(None, True, "−Z is not a linear combination of the neurons' rank-one matrices, so there is no J")
    free = m - rank
    if free > max_free:
        return Search(None, False, f"gave up: J has {free} free entries, 2^{free} cases; the limit is {max_free}")
    pivots = independent_rows(null) if free else []
    from_bits = null @ torch.linalg.inv(null[pivots]) if free else null
    for first in range(0, 2**free, 4096):
        cases = torch.arange(first, min(first + 4096, 2**free))
        bits = (cases.unsqueeze(-1) >> torch.arange(free) & 1).to(b)
        solutions = b + (bits - b[pivots]) @ from_bits.T  # (cases, m)
        nearest = solutions.round().clamp(0, 1)
        for J in nearest[(solutions - nearest).abs().amax(-1) < 1e-4].bool():
            if (subset_product(W1, W2, J) + Z).abs().max() <= tol * Z.abs().max():
                return Search(J, True, f"found, |J| = {int(J.sum())}")
    return Search(None, True, f"none of the 2^{free} candidates is a J")


def subset_equations(W1, W2, Z, n, seed=0):
    """n equations K b = target, (n, m) and (n,), that the 0-1 vector b of every J solves.

    n = h²: all of them, entry by entry. n < h²: random bilinear forms pᵀ(Σ_i b_i W₂[:, i]W₁[i, :])q = −pᵀZq, for which
    the h² rows are not needed.
    """
    h, m = W2.shape
    if n == h * h:
        return torch.einsum("im,mj->ijm", W2, W1).reshape(n, m), -Z.reshape(n)
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, n, h, generator=generator, dtype=torch.float64).to(W1)
    return (p @ W2) * (q @ W1.T), -((p @ Z) * q).sum(-1)


def live_neurons(W1, W2):
    """A mask (m,) of the neurons whose row of W₁ and column of W₂ are both non-zero; the others are dead."""
    return (W1 != 0).any(-1) & (W2 != 0).any(0)


def parallel_rows(W1, activation="relu"):
    """(m, m): for each pair of rows of W₁ the sign of their cosine if they are parallel, else 0; no row is zero.

    activation: a name in ABSORBING. Only for ReLU do rows of different lengths count: ReLU(cu) = c·ReLU(u) for c > 0.
    """
    lengths = W1.norm(dim=-1)
    rows = W1 / lengths[:, None]
    cosine = rows @ rows.T
    same = 1 - cosine.abs() < PARALLEL
    if activation != "relu":
        same &= (lengths[:, None] / lengths - 1).abs() < PARALLEL
    return torch.where(same, cosine.sign(), 0.0)


def distinct_neurons(W1, W2, activation="relu"):
    """Theorem 8.3's unstated assumption: no row of W₁ is zero or `parallel_rows`, and no column of W₂ is zero.

    For ReLU each neuron then has a kink of its own, and V needs the same m hyperplanes, each exactly once.
    """
    return bool(live_neurons(W1, W2).all()) and parallel_rows(W1, activation).abs().sum().item() == len(W1)


def merge_neurons(W1, W2, activation="relu"):
    """The same MLP without dead neurons, with those merged whose rows of W₁ are equal, for ReLU up to a factor."""
    keep = live_neurons(W1, W2)
    W1, W2 = W1[keep], W2[:, keep]
    if not len(W1):
        return W1, W2
    first = (parallel_rows(W1, activation) > 0).to(torch.uint8).argmax(-1)  # the neuron that each is merged into
    factors = W1.norm(dim=-1) / W1[first].norm(dim=-1)
    into = torch.nn.functional.one_hot(first, len(W1)).to(W1)
    W2 = (W2 * factors) @ into
    keep = (first == torch.arange(len(W1))) & (W2 != 0).any(0)
    return W1[keep], W2[:, keep]


class Absorption(NamedTuple):
    """Whether the skip can be absorbed; see `absorb`."""

    exists: bool | None  # whether V exists; None: undecided
    V1: torch.Tensor | None  # (m, h), if V exists
    V2: torch.Tensor | None  # (h, m), if V exists
    reason: str  # in words


def absorb(W1, W2, Z=None, max_free=20, activation="relu"):
    """Decide whether W₂f(W₁x) + Zx = V₂f(V₁x) has a solution with V₁, V₂ of W's shapes; an Absorption.

    activation: the name of f in ABSORBING. Yes: there is a J, or merging neurons and removing dead ones frees the h
    neurons that `widened` needs. No: there is no J, and the 'only if' of Theorem 8.3 applies (`distinct_neurons`).
    Undecided: the search gave up, or the 'only if' does not apply.
    """
    m, h = W1.shape
    search = find_subset(W1, W2, Z, max_free=max_free)
    if search.subset is not None:
        return Absorption(True, *theorem_8_3(W1, W2, search.subset, Z), f"Theorem 8.3: {search.reason}")
    if distinct_neurons(W1, W2, activation):
        return Absorption(False if search.exhaustive else None, None, None, search.reason)
    small1, small2 = merge_neurons(W1, W2, activation)
    spare = m - len(small1)
    if spare >= h and len(independent_rows(small1)) == h:
        V1, V2 = widened(small1, small2, Z)
        rest = m - len(V1)
        V1, V2 = torch.cat((V1, V1.new_zeros(rest, h))), torch.cat((V2, V2.new_zeros(h, rest)), dim=1)
        return Absorption(True, V1, V2, f"no J is needed: {spare} neurons are redundant, and {h} are enough")
    reason = "some neurons are dead or alike, so V may exist without a J ('only if' of Theorem 8.3 fails here)"
    return Absorption(None, None, None, f"{search.reason}; {reason}")


def planted_instance(h, size, generator, m=None, Z=None):
    """Random W₁ and W₂, float64, and a random J of the given size with W₂[:, J]W₁[J, :] = −Z; m=None means 4h.

    W₂[:, J] is changed by the least amount that gives the equation. Raises ValueError for a size outside [h, m].
    """
    m = 4 * h if m is None else m
    if not h <= size <= m:
        raise ValueError(f"J must have at least h={h} and at most m={m} elements, got {size}")
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
    """For how many of n random (W₁, W₂, Z, Z') a W' with φ_{W₁,W₂,Z} = φ_{W'₁,W'₂,Z'} exists: (yes, no, undecided).

    It exists if and only if W absorbs Z − Z', so n times 'no' is expected. What is true: for each pair Z' ≠ Z and
    almost every (W₁, W₂) no W' exists, because each J requires a polynomial equation in W. The corollary states the
    quantifiers in the other order (for almost every W, for every such Z'), and that is false for every W:
    `corollary_8_3_1_exception` gives a Z' and W' for each J. For almost every W these at most 2^m matrices Z' are the
    only exceptions.
    """
    answers = []
    for _ in range(n):
        W1, W2 = random_mlp(h, 4 * h if m is None else m, generator)
        Z, other = torch.randn(2, h, h, generator=generator, dtype=torch.float64)
        answers.append(absorb(W1, W2, Z - other).exists)
    return answers.count(True), answers.count(False), answers.count(None)


def corollary_8_3_1_exception(W1, W2, Z, J):
    """(W'₁, W'₂, Z') with φ_{W₁,W₂,Z} = φ_{W'₁,W'₂,Z'} and Z − Z' = −W₂[:, J]W₁[J, :], for any mask J (m,).

    For almost every W that difference is invertible if |J| ≥ h, so this contradicts Corollary 8.3.1 as stated. If J has
    all neurons, this is ReLU(y) = y + ReLU(−y).
    """
    W1_new = torch.where(J.unsqueeze(-1), -W1, W1)
    return W1_new, W2.clone(), Z + subset_product(W1, W2, J)


def independent_rows(M):
    """The indices, a list, of a largest set of linearly independent rows of M (n, k): Gram-Schmidt with pivoting."""
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
    """The identity matrix (h, h) with the dtype and device of W₁ (m, h)."""
    return torch.eye(W1.shape[1], dtype=W1.dtype, device=W1.device)
