"""Section 8.1: a change of basis through LayerNorm, RMSNorm and Dynamic Tanh.

Section 8.1 multiplies column vectors from the left, A L(x), so a d×d matrix here maps x (..., d) to x @ A.T. The
paper's diagonal matrix D is given by its diagonal (d,), the norm's `weight`. H is the subspace of vectors with mean 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def rounding(x):
    """What counts as 0 relative to 1 in x's dtype: 2e-13 in float64."""
    return 1e3 * torch.finfo(x.dtype).eps


def matvec(M, x):
    """M x for M (..., d, d) and x (..., d)."""
    return torch.einsum("...ij,...j->...i", M, x)


def centre(x):
    """x (..., d) minus its mean: its projection on H."""
    return x - x.mean(-1, keepdim=True)


def rms_norm(x, eps):
    """x / √(‖x‖²/d + ε) for x (..., d), without gain: a one-to-one map onto the open ball of radius √d."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm_inverse(z, eps):
    """The x with rms_norm(x, eps) = z, for z (..., d) in the open ball of radius √d: equation (11).

    Lemma 8.1's proof has s = r√ε/√(d − r²) before (11), which lacks a factor √d; (11) itself is right. If ε is far
    below the variance of x, z is within ε/(2·variance), relative, of the ball's surface, and rounding errors grow
    accordingly; `conjugate` composes L⁻¹, M and L without this loss.
    Raises ValueError for a z on the surface of the ball or outside it.
    """
    room = 1 - z.square().mean(-1, keepdim=True)
    if not (room > 0).all():
        raise ValueError(
            f"vectors must be in the open ball of radius √d = {math.sqrt(z.shape[-1]):.6g}, the norm's image, got one "
            f"of length {z.norm(dim=-1).max().item():.6g}: scale them down"
        )
    return z * (eps / room).sqrt()


def layer_norm(x, eps):
    """L_ε of equation (7) for x (..., d), without gain: rms_norm of the centred x. Its image is H's open ball."""
    return rms_norm(centre(x), eps)


def layer_norm_inverse(z, eps):
    """The x of mean 0 with layer_norm(x, eps) = z, for z (..., d) in H of length below √d; others are x + γ·1.

    Raises ValueError for a z whose mean is not 0 (up to rounding) or that is not in the open ball.
    """
    mean = z.mean(-1).abs().max().item()
    if mean > rounding(z) * max(1.0, z.abs().max().item()):
        raise ValueError(f"vectors must have mean 0, as LayerNorm's output has, got mean {mean:.3g}: centre them first")
    return rms_norm_inverse(z, eps)


def dynamic_tanh(x, alpha, gamma, beta):
    """γ·tanh(αx) + β of Remark 4 for x (..., d); alpha, gamma, beta (d,) or scalars. Its image is an open box."""
    return gamma * torch.tanh(alpha * x) + beta


def dynamic_tanh_inverse(z, alpha, gamma, beta):
    """The x with dynamic_tanh(x, alpha, gamma, beta) = z (..., d), for z in the open box β ± |γ|.

    Raises ValueError if an alpha or gamma is 0, so that the map is not one to one, or if z is not in the box.
    """
    if (torch.as_tensor(alpha) == 0).any() or (torch.as_tensor(gamma) == 0).any():
        raise ValueError("Dynamic Tanh has no inverse if an alpha or a gamma is 0: all must be non-zero")
    inside = (z - beta) / gamma
    if not (inside.abs() < 1).all():
        raise ValueError(
            "vectors must be in the open box β ± |γ|, the image of Dynamic Tanh, got one outside it: scale it down"
        )
    return torch.atanh(inside) / alpha


def conjugate(x, M, eps, centred=True):
    """f_M(x) = L⁻¹(M L(x)) for x (..., d) and M (..., d, d): √(dε / (‖c‖² + dε − ‖Mc‖²)) · Mc, c the centred x.

    Remark 3's form of Lemma 8.1's f with h = 0. Unless ‖Mc‖ ≈ ‖c‖, it keeps the precision that composing the three maps
    loses near the surface of the ball. centred=False is for RMSNorm: c = x. For LayerNorm it equals L⁻¹ ∘ M ∘ L only if
    M maps H into H, as Lemma 8.1's does; the formula itself is defined without that.
    Raises ValueError if ‖Mc‖² ≥ ‖c‖² + dε for some x, that is if M L(x) is not in the ball: never if ‖M‖ ≤ 1 on H.
    """
    c = centre(x) if centred else x
    image = matvec(M, c)
    room = eps + (c.square() - image.square()).mean(-1, keepdim=True)
    if not (room > 0).all():
        raise ValueError(
            f"M maps {int((room <= 0).sum())} of {room.numel()} normalised vectors out of the open ball that is the "
            "norm's image, so f is not defined there: scale M to operator norm 1 or less"
        )
    return image * (eps / room).sqrt()


class Conjugation(NamedTuple):
    """Lemma 8.1 for a matrix A: v (..., d), λ₀ (...) and M₀ = λ₀ Diag(v) A (..., d, d)."""

    v: torch.Tensor
    scale: torch.Tensor
    M: torch.Tensor


def lemma_8_1(A):
    """v, λ₀ and M₀ of Lemma 8.1 for A (..., d, d): layer_norm(conjugate(x, M₀, ε), ε) = M₀ layer_norm(x, ε) for all x.

    M₀ maps H into H and has operator norm 1 there. For any function h, f + h(x)·1 solves (8) as well.
    What the lemma does not say:
    - It asks for some diagonal matrix D, and D = 0 with f = 0 is always one. Its content is D = λ₀ Diag(v).
    - λ₀ exists if and only if no row of A is constant: if row i is c·1, then v = ±e_i, and Diag(v) A is 0 on H.
    - Every λ with |λ| ≤ λ₀, of either sign, works as well; f is then conjugate(x, λ/λ₀·M₀, ε).
    - f is one to one (up to multiples of 1) if and only if no entry of v is 0, and onto H only if M₀ is an isometry
      of H.
    Raises ValueError for a singular A, a constant row, or d < 2, where H is {0}.
    """
    d = A.shape[-1]
    if d < 2:
        raise ValueError("Lemma 8.1 needs d to be 2 or more, got 1: LayerNorm of one number is always 0")
    solution, failed = torch.linalg.solve_ex(A.mT, A.new_ones(A.shape[:-1]).unsqueeze(-1))
    v = solution.squeeze(-1)
    length = v.norm(dim=-1, keepdim=True)
    if failed.any() or not (length.squeeze(-1) * A.norm(dim=(-2, -1)) < 1 / rounding(A)).all():
        raise ValueError("Lemma 8.1 needs an invertible matrix, got one that is singular up to rounding")
    v = v / length
    unscaled = v.unsqueeze(-1) * A
    norm = norm_on_mean_free(unscaled)
    if (norm <= rounding(A) * A.norm(dim=(-2, -1))).any():
        raise ValueError(
            "Lemma 8.1 needs an A without a constant row: with one, Diag(v) A is 0 on vectors of mean 0, λ₀ does not "
            "exist, and only f = 0 is left"
        )
    scale = 1 / norm
    return Conjugation(v, scale, scale[..., None, None] * unscaled)


def norm_on_mean_free(M):
    """The operator norm (...) of M (..., d, d) restricted to H: Lemma 8.1's ‖M|_H‖₂ for an M that preserves H."""
    return operator_norm(M - M.mean(-1, keepdim=True))  # M (I − 11ᵀ/d)


def operator_norm(M):
    """‖M‖₂ (...) of M (..., d, d): the root of MᵀM's largest eigenvalue, in a third of the time of svdvals."""
    return torch.linalg.eigvalsh(M.mT @ M)[..., -1].clamp(min=0).sqrt()


class Rewritten(NamedTuple):
    """norm' and MLP' with norm'(x + MLP'(x)) = Θ norm(x + MLP(x)) for all x: equation (9)."""

    gain: torch.Tensor  # the diagonal of D', (d,)
    norm: Callable  # norm', (..., d) to (..., d)
    mlp: Callable  # MLP', (..., d) to (..., d)


def layernorm_theorem_8_2(theta, gain, mlp, eps, h=None, scale=1.0):
    """D' and MLP' of Theorem 8.2 as a Rewritten, for Θ theta (d, d), D's diagonal gain (d,) and a function mlp.

    D' = Diag(λv)⁻¹ and MLP'(x) = f(x + MLP(x)) − x + h(x)·1, with λ = scale·λ₀ and Lemma 8.1's v, λ₀ and f for A = ΘD;
    h is a function from (..., d) to (...), None for 0. A bias β after the gain becomes Θβ, which needs no theorem.
    What differs from the theorem as stated, if the values of L(x + MLP(x)) span H:
    - 'D' must be Diag(λ₀v)⁻¹' determines D' only up to a scalar: every scale in [−1, 1] other than 0 gives a solution.
      For a larger one MLP'(x) is undefined for some x if x + MLP(x) takes every value, and raises ValueError there.
    - Every entry of v ∝ Θ⁻ᵀD⁻¹1 must be non-zero. Otherwise Diag(v) has no inverse, and, with one exception, there is
      no solution at all (ValueError).
    - The exception is v = ±e_i: row i of ΘD is constant and λ₀ does not exist, yet (9) has a solution. D'_ii = 0, and
      the other entries are equal to a number that is large enough: here the least one, divided by scale.
    - For most Θ, D' has entries of both signs, unlike D.
    Equation (9) is about what follows the norm. The residual stream itself becomes f(x + MLP(x)) + h(x)·1. Its part in
    H is bounded for most directions, so a skip connection around what follows the norm no longer carries x + MLP(x).
    """
    if not (0 < abs(scale) <= 1):
        raise ValueError(f"scale must be in [-1, 1] and not 0, got {scale}: beyond λ₀, MLP' is undefined for some x")
    if not (gain > 0).all():
        raise ValueError(f"Theorem 8.2 needs a positive gain, got {gain.min().item():.3g}")
    A = theta * gain
    constant = (centre(A).abs().amax(-1) <= rounding(A) * A.abs().amax(-1)).nonzero().flatten()
    if len(constant) == 1:  # with two, A is singular, and lemma_8_1 raises
        M = A.clone()
        M[constant] = A[constant] - A.sum(0)  # the only row with which all columns sum to 0, so that M(H) ⊂ H
        size = norm_on_mean_free(M) / scale
        M = M / size
        new_gain = size * torch.ones_like(gain)
        new_gain[constant] = 0
    else:
        v, largest, M = lemma_8_1(A)
        if v.abs().min() <= rounding(v) * v.abs().max():
            raise ValueError(
                f"entry {v.abs().argmin().item()} of v ∝ Θ⁻ᵀD⁻¹1 is 0, so no diagonal D' solves equation (9) for this "
                "Θ: choose another basis"
            )
        new_gain, M = 1 / (scale * largest * v), scale * M

    def new_mlp(x):
        y = conjugate(x + mlp(x), M, eps) - x
        return y if h is None else y + h(x).unsqueeze(-1)

    return Rewritten(new_gain, lambda u: new_gain * layer_norm(u, eps), new_mlp)


def rmsnorm_theorem_8_2(theta, gain, mlp, eps, new_gain=None):
    """Theorem 8.2 for RMSNorm (Remark 4) as a Rewritten; arguments as for LayerNorm, without h: the mean matters here.

    The image of RMSNorm is a ball of the whole space, so there is no H to preserve and no v: for every Θ, each D' with
    non-zero entries and ‖D'⁻¹ΘD‖₂ ≤ 1 works. new_gain is its diagonal (d,); None: ‖ΘD‖₂ in every entry, the least
    multiple of I. Raises ValueError if new_gain is too small, because MLP'(x) is then undefined for some x.
    """
    A = theta * gain
    if new_gain is None:
        new_gain = operator_norm(A) * torch.ones_like(gain)
    M = A / new_gain.unsqueeze(-1)
    norm = operator_norm(M).item()
    if not norm <= 1 + rounding(M):
        raise ValueError(f"new_gain is too small: ‖D'⁻¹ΘD‖ must be at most 1, got {norm:.6g}; multiply new_gain by it")
    return Rewritten(
        new_gain,
        lambda u: new_gain * rms_norm(u, eps),
        lambda x: conjugate(x + mlp(x), M, eps, centred=False) - x,
    )


def dyt_theorem_8_2(theta, alpha, gamma, beta, mlp, new_alpha=None):
    """Theorem 8.2 for Dynamic Tanh (Remark 4) as a Rewritten; alpha, gamma, beta (d,) or scalars.

    γ'_i = Σ_j |Θ_ij γ_j|, β' = Θβ, and MLP'(x) = DyT'⁻¹(Θ DyT(x + MLP(x))) − x. It is not enough that DyT is one to
    one onto its image, which is all that the remark says: Θ must also map the old open box into the new one. This γ' is
    the least for which it does, with this β'; a larger one works, too. α' can be any non-zero number; None: α. Only the
    new norm must be one to one. In floating point tanh reaches ±1; if that leaves the open box, MLP' raises ValueError.
    """
    gamma, beta = (torch.as_tensor(value, dtype=theta.dtype).expand(len(theta)) for value in (gamma, beta))
    new_alpha = alpha if new_alpha is None else new_alpha
    new_gamma, new_beta = (theta * gamma).abs().sum(-1), matvec(theta, beta)

    def new_mlp(x):
        target = matvec(theta, dynamic_tanh(x + mlp(x), alpha, gamma, beta))
        return dynamic_tanh_inverse(target, new_alpha, new_gamma, new_beta) - x

    return Rewritten(new_gamma, lambda u: dynamic_tanh(u, new_alpha, new_gamma, new_beta), new_mlp)


def equation_9_gap(x, theta, norm, mlp, rewritten):
    """The largest |norm'(x + MLP'(x)) − Θ norm(x + MLP(x))| over x (..., d), divided by the latter's largest entry.

    norm: the original norm with its gain, a function from (..., d) to (..., d).
    """
    target = matvec(theta, norm(x + mlp(x)))
    return ((rewritten.norm(x + rewritten.mlp(x)) - target).abs().max() / target.abs().max()).item()
