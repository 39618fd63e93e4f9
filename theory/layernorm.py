"""Section 8.1: a change of basis through LayerNorm, RMSNorm and Dynamic Tanh.

Section 8.1 multiplies column vectors from the left (A L(x)), so a d×d matrix here maps (..., d) to x @ A.T; what the
paper calls D is given by its diagonal, (d,), which is the norm's `weight`. H is the subspace of mean-free vectors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def rounding(x):
    """What counts as 0 next to 1 in x's dtype: 2e-13 in float64."""
    return 1e3 * torch.finfo(x.dtype).eps


def matvec(M, x):
    """M x for M (..., d, d) and x (..., d)."""
    return torch.einsum("...ij,...j->...i", M, x)


def centre(x):
    """x (..., d) without its mean: its projection on H."""
    return x - x.mean(-1, keepdim=True)


def rms_norm(x, eps):
    """x / √(‖x‖²/d + ε) for x (..., d), with no gain. Onto the open ball of radius √d, one to one."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm_inverse(z, eps):
    """The x with rms_norm(x, eps) = z, for z (..., d) in the open ball of radius √d: equation (11).

    Lemma 8.1's proof has s = r√ε/√(d − r²) on the way to (11), which lacks a factor √d under ε; (11) is right.
    Where x came from a norm with ε far below x's variance, z lies within ε/(2·variance) of the ball's surface, and
    that is the relative precision of dtype that is lost here: `conjugate` composes without this loss.
    Raises ValueError for a z on the ball's surface or outside it.
    """
    room = 1 - z.square().mean(-1, keepdim=True)
    if not (room > 0).all():
        raise ValueError(
            f"the norm reaches only the open ball of radius √d = {math.sqrt(z.shape[-1]):.6g}, and a vector of length "
            f"{z.norm(dim=-1).max().item():.6g} is not in it; scale the vectors down"
        )
    return z * (eps / room).sqrt()


def layer_norm(x, eps):
    """L_ε of equation (7) for x (..., d), with no gain: rms_norm of the centred x. Onto the open ball of H."""
    return rms_norm(centre(x), eps)


def layer_norm_inverse(z, eps):
    """The mean-free x with layer_norm(x, eps) = z, for z (..., d) in H of length below √d; others are x + γ·1.

    Raises ValueError for a z that is not mean-free (up to rounding) or not in the open ball.
    """
    mean = z.mean(-1).abs().max().item()
    if mean > rounding(z) * max(1.0, z.abs().max().item()):
        raise ValueError(f"LayerNorm reaches only vectors of mean 0, and a mean here is {mean:.3g}; centre them first")
    return rms_norm_inverse(z, eps)


def dynamic_tanh(x, alpha, gamma, beta):
    """γ·tanh(αx) + β of Remark 4 for x (..., d); alpha, gamma, beta (d,) or scalars. Onto an open box."""
    return gamma * torch.tanh(alpha * x) + beta


def dynamic_tanh_inverse(z, alpha, gamma, beta):
    """The x with dynamic_tanh(x, alpha, gamma, beta) = z (..., d), for z in the open box β ± |γ|.

    Raises ValueError where an alpha or gamma is 0 (the map is not one to one) or z is not in the box.
    """
    if (torch.as_tensor(alpha) == 0).any() or (torch.as_tensor(gamma) == 0).any():
        raise ValueError("Dynamic Tanh has no inverse where an alpha or a gamma is 0; make them all non-zero")
    inside = (z - beta) / gamma
    if not (inside.abs() < 1).all():
        raise ValueError("Dynamic Tanh reaches only the open box β ± |γ|, and a vector is not in it; scale it down")
    return torch.atanh(inside) / alpha


def conjugate(x, M, eps, centred=True):
    """f_M(x) = L⁻¹(M L(x)) for x (..., d) and M (..., d, d): √(dε / (‖c‖² + dε − ‖Mc‖²)) · Mc, c the centred x.

    Remark 3's form of Lemma 8.1's f with h = 0; it keeps the precision that the composition loses near the ball's
    surface, but where ‖Mc‖ ≈ ‖c‖. centred=False is RMSNorm's: c = x. In LayerNorm's case it is L⁻¹ ∘ M ∘ L only for an
    M that maps H into H (Lemma 8.1's does); the formula itself does not ask for it.
    Raises ValueError where ‖Mc‖² ≥ ‖c‖² + dε, that is where M L(x) is not in the ball: never if ‖M‖ ≤ 1 on H.
    """
    c = centre(x) if centred else x
    image = matvec(M, c)
    room = eps + (c.square() - image.square()).mean(-1, keepdim=True)
    if not (room > 0).all():
        raise ValueError(
            f"M takes {int((room <= 0).sum())} of {room.numel()} normalised vectors out of the open ball that the norm "
            "reaches, so f is not defined there; scale M to operator norm 1 or less"
        )
    return image * (eps / room).sqrt()


class Conjugation(NamedTuple):
    """Lemma 8.1 for a matrix A: v (..., d), λ₀ (...) and M₀ = λ₀ Diag(v) A (..., d, d)."""

    v: torch.Tensor
    scale: torch.Tensor
    M: torch.Tensor


def lemma_8_1(A):
    """v, λ₀ and M₀ of Lemma 8.1 for A (..., d, d): layer_norm(conjugate(x, M₀, ε), ε) = M₀ layer_norm(x, ε) for all x.

    M₀ maps H into H with operator norm 1 there. Adding h(x)·1 to f changes nothing, for any function h.
    What the lemma does not say:
    - It asks only for some diagonal matrix, and D = 0 with f = 0 always does. The content is D = λ₀ Diag(v).
    - λ₀ exists if and only if no row of A is constant: row i = c·1 makes v = ±e_i, and Diag(v) A vanishes on H.
    - Every λ with |λ| ≤ λ₀ does as well, of either sign (f is then conjugate(x, λ/λ₀·M₀, ε)).
    - f is one to one (up to adding multiples of 1) if and only if no entry of v is 0, and onto H only if M₀ is an
      isometry of H.
    Raises ValueError for a singular A, a constant row, or d < 2 (H is then {0}).
    """
    d = A.shape[-1]
    if d < 2:
        raise ValueError("LayerNorm of one number is always 0; Lemma 8.1 needs d of 2 or more")
    solution, failed = torch.linalg.solve_ex(A.mT, A.new_ones(A.shape[:-1]).unsqueeze(-1))
    v = solution.squeeze(-1)
    length = v.norm(dim=-1, keepdim=True)
    if failed.any() or not (length.squeeze(-1) * A.norm(dim=(-2, -1)) < 1 / rounding(A)).all():
        raise ValueError("A is singular to working precision; Lemma 8.1 needs an invertible matrix")
    v = v / length
    unscaled = v.unsqueeze(-1) * A
    norm = norm_on_mean_free(unscaled)
    if (norm <= rounding(A) * A.norm(dim=(-2, -1))).any():
        raise ValueError(
            "a row of A is constant, so Diag(v) A is 0 on mean-free vectors and λ₀ does not exist; Lemma 8.1 then "
            "holds with f = 0 only"
        )
    scale = 1 / norm
    return Conjugation(v, scale, scale[..., None, None] * unscaled)


def norm_on_mean_free(M):
    """The operator norm (...) of M (..., d, d) restricted to H: Lemma 8.1's ‖M|_H‖₂ for an M that preserves H."""
    return operator_norm(M - M.mean(-1, keepdim=True))  # M (I − 11ᵀ/d)


def operator_norm(M):
    """‖M‖₂ (...) of M (..., d, d), as the root of MᵀM's largest eigenvalue: a third of a singular value's time."""
    return torch.linalg.eigvalsh(M.mT @ M)[..., -1].clamp(min=0).sqrt()


class Rewritten(NamedTuple):
    """The two sides of equation (9): norm' and MLP' such that norm'(x + MLP'(x)) = Θ norm(x + MLP(x)) for all x.

    gain is the diagonal of D' (d,); norm and mlp are functions of x (..., d).
    """

    gain: torch.Tensor
    norm: Callable
    mlp: Callable


def layernorm_theorem_8_2(theta, gain, mlp, eps, h=None, scale=1.0):
    """D' and MLP' of Theorem 8.2 as a Rewritten, for Θ theta (d, d), D's diagonal gain (d,) and a function mlp.

    D' = Diag(λv)⁻¹ and MLP'(x) = f(x + MLP(x)) − x + h(x)·1, with λ = scale·λ₀; v, λ₀ and f of Lemma 8.1 for A = ΘD,
    h a function from (..., d) to (...), None: 0. A bias β after the gain becomes Θβ, which needs no theorem.
    What differs from the theorem as stated, where the values of L(x + MLP(x)) span H:
    - 'D' must be Diag(λ₀v)⁻¹' fixes D' up to the scalar only: every scale in [−1, 1] other than 0 gives a solution.
      Outside it MLP'(x) is undefined for some x once x + MLP(x) takes every value, and raises ValueError there.
    - It needs every entry of v ∝ Θ⁻ᵀD⁻¹1 to be non-zero; otherwise Diag(v) has no inverse, and then there is no
      solution at all (ValueError), but for one case.
    - That case is v = ±e_i: row i of ΘD is constant, λ₀ does not exist, yet (9) can be solved: D'_ii = 0 and the other
      entries equal to a number that is large enough, the least such here (divided by scale).
    - D' has entries of either sign for most Θ, unlike D.
    (9) equates what follows the norm. The residual stream itself becomes f(x + MLP(x)) + h(x)·1, whose mean-free part
    is bounded for most directions: a skip around what follows the norm does not carry x + MLP(x) any more.
    """
    if not (0 < abs(scale) <= 1):
        raise ValueError(f"scale must be in [-1, 1] and not 0, not {scale}: beyond λ₀, MLP' is undefined for some x")
    if not (gain > 0).all():
        raise ValueError("Theorem 8.2 needs a gain of positive entries")
    A = theta * gain
    constant = (centre(A).abs().amax(-1) <= rounding(A) * A.abs().amax(-1)).nonzero().flatten()
    if len(constant) == 1:  # with two, A is singular, and lemma_8_1 says so
        M = A.clone()
        M[constant] = A[constant] - A.sum(0)  # the only row that makes the columns' sums 0, hence M(H) ⊂ H
        size = norm_on_mean_free(M) / scale
        M = M / size
        new_gain = size * torch.ones_like(gain)
        new_gain[constant] = 0
    else:
        v, largest, M = lemma_8_1(A)
        if v.abs().min() <= rounding(v) * v.abs().max():
            raise ValueError(
                f"entry {v.abs().argmin().item()} of v ∝ Θ⁻ᵀD⁻¹1 is 0, so no diagonal D' solves equation (9) for this "
                "Θ; choose another basis"
            )
        new_gain, M = 1 / (scale * largest * v), scale * M

    def new_mlp(x):
        y = conjugate(x + mlp(x), M, eps) - x
        return y if h is None else y + h(x).unsqueeze(-1)

    return Rewritten(new_gain, lambda u: new_gain * layer_norm(u, eps), new_mlp)


def rmsnorm_theorem_8_2(theta, gain, mlp, eps, new_gain=None):
    """Theorem 8.2 for RMSNorm (Remark 4) as a Rewritten; arguments as for LayerNorm, with no h: the mean counts here.

    RMSNorm is onto a ball of the whole space, so there is no H to preserve and no v: every D' with no entry 0 and
    ‖D'⁻¹ΘD‖₂ ≤ 1 will do, for every Θ. new_gain is its diagonal (d,); None: ‖ΘD‖₂ in every entry, the least
    multiple of I. Raises ValueError for a new_gain that is too small, with which MLP'(x) is undefined for some x.
    """
    A = theta * gain
    if new_gain is None:
        new_gain = operator_norm(A) * torch.ones_like(gain)
    M = A / new_gain.unsqueeze(-1)
    norm = operator_norm(M).item()
    if not norm <= 1 + rounding(M):
        raise ValueError(f"new_gain is too small: ‖D'⁻¹ΘD‖ must be at most 1, and is {norm:.6g}; multiply it by that")
    return Rewritten(
        new_gain,
        lambda u: new_gain * rms_norm(u, eps),
        lambda x: conjugate(x + mlp(x), M, eps, centred=False) - x,
    )


def dyt_theorem_8_2(theta, alpha, gamma, beta, mlp, new_alpha=None):
    """Theorem 8.2 for Dynamic Tanh (Remark 4) as a Rewritten; alpha, gamma, beta (d,) or scalars.

    γ'_i = Σ_j |Θ_ij γ_j|, β' = Θβ, and MLP'(x) = DyT'⁻¹(Θ DyT(x + MLP(x))) − x. That DyT is one to one onto its
    image, which is all that the remark says, is not enough: Θ must map the one open box into the other, and this γ'
    is the least that does with this β' (a larger one would do). α' is free but for 0; None: α. Only the new norm has
    to be one to one. In floating point tanh reaches ±1: MLP' raises ValueError where that leaves the open box.
    """
    gamma, beta = (torch.as_tensor(value, dtype=theta.dtype).expand(len(theta)) for value in (gamma, beta))
    new_alpha = alpha if new_alpha is None else new_alpha
    new_gamma, new_beta = (theta * gamma).abs().sum(-1), matvec(theta, beta)

    def new_mlp(x):
        target = matvec(theta, dynamic_tanh(x + mlp(x), alpha, gamma, beta))
        return dynamic_tanh_inverse(target, new_alpha, new_gamma, new_beta) - x

    return Rewritten(new_gamma, lambda u: dynamic_tanh(u, new_alpha, new_gamma, new_beta), new_mlp)


def equation_9_gap(x, theta, norm, mlp, rewritten):
    """The largest |norm'(x + MLP'(x)) − Θ norm(x + MLP(x))| over x (..., d), next to the largest entry of the latter.

    norm is the original norm with its gain, (..., d) to (..., d).
    """
    target = matvec(theta, norm(x + mlp(x)))
    return ((rewritten.norm(x + rewritten.mlp(x)) - target).abs().max() / target.abs().max()).item()
