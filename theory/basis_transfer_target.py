"""The functions that Section 5.1 asks an MLP with a skip connection to approximate.

Each is x ↦ W₂·σ(W₁x) + Lx; as in Section 5.1, matrices multiply column vectors from the left. The target `paper` is
equation (4): W₁ (4h, h), W₂ (h, 4h) and Z (h, h) have standard Gaussian entries divided by √(4h), √(4h) and √h, and
L = Z − I. A target `Ω₁/Ω₂` is the composition Ω₁ ∘ (MLP + Id) ∘ Ω₂⁻¹ of equation (3), for an MLP with such W₁ and W₂.
It has the same form, with W₁Ω₂⁻¹ and Ω₁W₂ in place of W₁ and W₂, and L = Ω₁Ω₂⁻¹.

So equation (4) is not an instance of (3) but has its form, with Z − I in place of Ω₁Ω₂⁻¹. Because the model has a skip
connection, its MLP must approximate L − I, which is Z − 2I for the paper's target.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

RATIO = 4  # the hidden width of every target's MLP, divided by h
STREAMS = ("target", "model", "train", "linear", "test")  # what the random numbers are for
BASES = ("identity", "orthogonal", "gaussian", "gaussian:κ")


def stream_seed(stream, h, seed, number=0):
    """The seed of a random generator, a pure function of its purpose, so that a resumed run sees the same inputs."""
    return int(np.random.SeedSequence((STREAMS.index(stream), h, seed, number)).generate_state(1)[0])


def read_target(name):
    """Parse a target's name: ((kind, condition number or None) of Ω₁, the same of Ω₂), or None for the paper's target.

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
                f"targets must be 'paper' or Ω₁/Ω₂ with each Ω one of {', '.join(BASES)}, got {name!r}: κ is a "
                "condition number, 1 or more, and Ω₂ can be 'same', as in orthogonal/identity or gaussian:100/same"
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
    """A change of basis Ω, (h, h) float64, scaled so that the mean square of its singular values is 1.

    kind: 'identity'; 'orthogonal', uniformly distributed; 'gaussian', independent entries. With a condition number the
    Gaussian matrix's singular values are first raised to the power that gives it.
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
    """The Target of this name (see `read_target`) and seed in h dimensions; drawn in float64, returned in float32."""
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
