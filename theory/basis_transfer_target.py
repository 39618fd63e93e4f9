"""The functions that Section 5.1 asks an MLP with a skip connection to approximate.

Each is x ↦ W₂·σ(W₁x) + Lx. `paper` is equation (4): Gaussian W₁ (4h, h), W₂ (h, 4h) and Z (h, h), over √(4h), √(4h)
and √h, and L = Z − I. `Ω₁/Ω₂` is the composition of equation (3), Ω₁ ∘ (MLP + Id) ∘ Ω₂⁻¹, of an MLP with such W₁ and
W₂: with W₁Ω₂⁻¹ and Ω₁W₂ in their places it is of that form, and L = Ω₁Ω₂⁻¹.

So equation (4) is not an instance of (3), but has its form, with Z − I for Ω₁Ω₂⁻¹. The model has the skip besides, so
its MLP has Z − 2I to make up for.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

RATIO = 4  # the hidden width of every target's MLP over h
STREAMS = ("target", "model", "train", "linear", "test")  # what random numbers are drawn for
BASES = ("identity", "orthogonal", "gaussian", "gaussian:κ")


def stream_seed(stream, h, seed, number=0):
    """The seed of a random generator, a pure function of what it is for: so a resumed run sees the same inputs."""
    return int(np.random.SeedSequence((STREAMS.index(stream), h, seed, number)).generate_state(1)[0])


def read_target(name):
    """What a target's name says of Ω₁ and Ω₂: a pair of (kind, condition number or None); None for the paper's target.

    Raises ValueError for a name that is neither 'paper' nor Ω₁/Ω₂.
    """
    if name == "paper":
        return None
    first, _, second = name.partition("/")
    kinds = []
    for text in (first, first if second == "same" else second):
        kind, colon, number = text.partition(":")
        try:
            condition_number = float(number) if colon else None
        except ValueError:
            condition_number = math.nan
        if kind not in BASES or (colon and not (kind == "gaussian" and 1 <= condition_number < math.inf)):
            raise ValueError(
                f"targets: {name!r} is neither 'paper' nor Ω₁/Ω₂ with each of {', '.join(BASES)} (κ is its condition "
                "number, 1 or more), or 'same' for Ω₂ = Ω₁; for example orthogonal/identity or gaussian:100/same"
            )
        kinds.append((kind, condition_number))
    return tuple(kinds)


class Target(NamedTuple):
    """x ↦ W2·σ(W1·x) + linear·x."""

    W1: torch.Tensor  # (4h, h)
    W2: torch.Tensor  # (h, 4h)
    linear: torch.Tensor  # (h, h)

    def __call__(self, x, activation):
        """The target's values at the rows of x, (n, h)."""
        return torch.addmm(activation(x @ self.W1.T) @ self.W2.T, x, self.linear.T)


def basis(kind, condition_number, h, generator):
    """A change of basis Ω, (h, h) float64, with 1 as the mean square of its singular values.

    kind: 'identity'; 'orthogonal', uniformly distributed; 'gaussian', independent entries. A condition number raises
    the Gaussian matrix's singular values to the power that gives it; None leaves them as drawn.
    """
    if kind == "identity":
        return torch.eye(h, dtype=torch.float64)
    drawn = torch.randn(h, h, generator=generator, dtype=torch.float64)
    if kind == "orthogonal":
        Q, R = torch.linalg.qr(drawn)
        return Q * R.diagonal().sign()
    U, values, Vh = torch.linalg.svd(drawn)
    if condition_number is not None:
        values = values ** (math.log(condition_number) / math.log(values[0] / values[-1]))
    return U * (values * math.sqrt(h) / values.norm()) @ Vh


def make_target(name, h, seed):
    """The Target called name (see `read_target`) in h dimensions that a seed draws; made in float64, then float32."""
    generator = torch.Generator().manual_seed(stream_seed("target", h, seed))

    def gaussian(rows, columns, scale):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(scale)

    m = RATIO * h
    W1, W2 = gaussian(m, h, m), gaussian(h, m, m)
    kinds = read_target(name)
    if kinds is None:
        linear = gaussian(h, h, h) - torch.eye(h, dtype=torch.float64)
    else:
        omega_1 = basis(*kinds[0], h, generator)
        omega_2 = omega_1 if name.endswith("/same") else basis(*kinds[1], h, generator)
        inverse = torch.linalg.inv(omega_2)
        W1, W2, linear = W1 @ inverse, omega_1 @ W2, omega_1 @ inverse
    return Target(W1.float(), W2.float(), linear.float())
