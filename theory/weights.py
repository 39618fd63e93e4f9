"""The matrices of a GPT in the paper's orientation: Y = XW with W of shape (in, out), the transpose of `Linear.weight`.

`read_weights` and `build_model` transpose state dicts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import GPT

LAYERS = {"attn.c_proj": "o", "mlp.router": "router", "mlp.c_fc": "up", "mlp.c_proj": "down"}


class Affine(NamedTuple):
    """X ↦ X·weight + bias; weight (in, out), bias (out,), zeros where the model has none."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class Weights:
    """A GPT's matrices in float64, in the paper's orientation."""

    tokens: torch.Tensor  # E, (V, d)
    positions: torch.Tensor | None  # E_P, (T, d), for learned positions
    head: Affine  # W_LM, (d, V)
    blocks: list[dict[str, Affine]]  # 'q', 'k', 'v' (without identity projections), 'o', 'router' (MoE), 'up', 'down'


def read_weights(model):
    """The Weights of a GPT. They may share memory with the model: replace entries, never change them in place.

    Raises ValueError, with the parameter's name, if a weight is not finite.
    """
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values: use an earlier checkpoint")

    def affine(name):
        weight = state[f"{name}.weight"].T
        return Affine(weight, state.get(f"{name}.bias", weight.new_zeros(weight.size(1))))

    blocks = []
    for i, module in enumerate(model.transformer.h):
        parts = map(Affine, *map(module.attn.split_qkv, affine(f"transformer.h.{i}.attn.c_attn")))
        block = {name: part for name, part in zip("qkv", parts, strict=True) if part.bias.numel()}
        for layer, name in LAYERS.items():
            if f"transformer.h.{i}.{layer}.weight" in state:
                block[name] = affine(f"transformer.h.{i}.{layer}")
        blocks.append(block)
    positions = state.get("transformer.wpe.weight")
    return Weights(state["transformer.wte.weight"], positions, affine("lm_head"), blocks)


def build_model(weights, config, like):
    """A GPT with this config and these Weights; norms, dtype, device and mode are those of the GPT `like`.

    Raises ValueError if weights have a non-zero bias where a GPT with this config has none.
    """
    state = {name: tensor for name, tensor in like.state_dict().items() if ".ln_" in name}

    def put(name, layer, bias):
        state[f"{name}.weight"] = layer.weight.T
        if bias:
            state[f"{name}.bias"] = layer.bias
        elif layer.bias.any():
            raise ValueError(
                f"removing the projection adds its bias to the residual stream, and {name}, which has no bias, cannot "
                "subtract it again: exact only for models with bias=False or with this bias equal to zero"
            )

    state["transformer.wte.weight"] = weights.tokens
    if weights.positions is not None:
        state["transformer.wpe.weight"] = weights.positions
    if config.tie_weights:
        state["lm_head.weight"] = weights.tokens
    else:
        put("lm_head", weights.head, bias=False)
    for i, block in enumerate(weights.blocks):
        parts = [block[name] for name in "qkv" if name in block]
        merged = Affine(torch.cat([part.weight for part in parts], dim=1), torch.cat([part.bias for part in parts]))
        put(f"transformer.h.{i}.attn.c_attn", merged, config.bias)
        for layer, name in LAYERS.items():
            if name in block:
                put(f"transformer.h.{i}.{layer}", block[name], config.bias and name != "router")
    with torch.random.fork_rng(devices=[]):  # GPT() draws initial weights, which are replaced below
        built = GPT(config)
    parameter = like.lm_head.weight
    built.to(parameter.device, parameter.dtype).load_state_dict(state)
    return built.train(like.training)


def has_full_rank(values):
    """Whether the smallest of a matrix's singular values, in descending order, is larger than rounding errors."""
    return values[-1] > values[0] * len(values) * torch.finfo(values.dtype).eps


def condition_number(matrix):
    """The largest singular value over the smallest; inf if the matrix is singular up to rounding."""
    values = torch.linalg.svdvals(matrix)
    smallest = values[-1] if has_full_rank(values) else values.new_zeros(())
    return (values[0] / smallest).item() if values[0] > 0 else float("inf")
