"""The matrices of a GPT in the paper's orientation: Y = XW with W of shape (in, out), the transpose of `Linear.weight`.

`read_weights` and `build_model` transpose state dicts. The results in this folder are about what model.py computes, so
a model with an option or a parameter that is not known here is refused.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model import GPT

LAYERS = {"attn.c_proj": "o", "mlp.router": "router", "mlp.c_fc": "up", "mlp.c_proj": "down"}
ANY_VALUE = (
    "block_size vocab_size n_layer n_head n_kv_head n_embd mlp_ratio dropout bias tie_weights wq_identity wk_identity "
    "wv_identity attn_scale attn_skip mlp_skip parallel share_layers causal n_expert n_expert_active load_balance"
)
# The options of GPTConfig that the results take into account: None for any value, or those that they cover or refuse.
OPTIONS = dict.fromkeys(ANY_VALUE.split()) | {
    "activation": ("gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"),
    "norm": ("layernorm", "rmsnorm", "dyt", "none"),
    "pos": ("learned", "rope", "none"),
    "query_residual": (None,),
    **dict.fromkeys(("query_rotation", "wq_identity_from", "share_kv"), (False,)),
    "qk_norm": (False, True),
    "attn_logit_std": (None,),
}
# Those of a gauge: it changes nothing outside the heads, and of queries that are not X·W_Q it changes nothing at all.
OPTIONS_OF_HEADS = OPTIONS | {
    "query_residual": (None, "linear", "mlp"),
    **dict.fromkeys(("query_rotation", "wq_identity_from", "attn_logit_std")),
}
BUFFERS = ("rotary.cos", "rotary.sin", "attn.rotation")  # of attention, which follow from the options
KEPT = (".ln_", ".residual_")  # in names of parameters that are no part of Weights


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


def check_known(model, options=OPTIONS):
    """Raise ValueError, with the name, for a GPT with an option or a parameter that is not known here."""
    check_options(model.config, options)
    check_parameters(model)


def check_options(config, options=OPTIONS):
    """Raise ValueError, with the option and its value, for a GPTConfig with an option or a value not in options."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in options:
            given = "at its default" if value == field.default else f"not at its default, {field.default}"
            raise ValueError(
                f"theory/ must know every option of the model, got {field.name}={value}, {given}: say in "
                "theory/weights.py, OPTIONS, that its results hold with it, or use a model without this option"
            )
        if options[field.name] and value not in options[field.name]:
            known = ", ".join(map(str, options[field.name]))
            raise ValueError(
                f"theory/ knows {field.name}={known}, got {value}: say in theory/weights.py, OPTIONS, that its results "
                "hold with it, or use a model with another value"
            )


def in_older_options(model):
    """A GPT with the same logits in the options that the results cover, where it has such; else the model itself.

    Queries X + X·W_Q are X(I + W_Q), those of a trained query matrix; attn_logit_std is an attn_scale.
    """
    config = model.config
    changes = {}
    if config.attn_logit_std is not None and config.wq_identity_from == 0:
        changes |= dict(attn_logit_std=None, attn_scale=config.attn_scale_in(0))
    if config.query_residual == "linear" and config.wq_identity_from == 0:
        changes |= dict(query_residual=None, wq_identity=False)
    if not changes:
        return model
    with torch.random.fork_rng(devices=[]):
        plain = GPT(dataclasses.replace(config, **changes)).to(model.lm_head.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if "query_residual" in changes:
        for i in range(len(model.transformer.h)):
            state[f"transformer.h.{i}.attn.c_attn.weight"][: config.n_embd].diagonal().add_(1.0)
    plain.load_state_dict(state)
    return plain.train(model.training)


def known_shapes(config, n_block):
    """{name: shape} of every parameter of a GPT with n_block blocks, as its state dict has them."""
    d, norm = config.n_embd, norm_shapes(config)
    shapes = {"transformer.wte.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d)}
    if config.pos == "learned":
        shapes["transformer.wpe.weight"] = (config.block_size, d)
    shapes |= {f"transformer.ln_f.{name}": shape for name, shape in norm.items()}
    for layer in range(n_block):
        block = block_shapes(config, config.query(layer))
        for place in ("ln_1",) if config.parallel else ("ln_1", "ln_2"):
            block |= {f"{place}.{name}": shape for name, shape in norm.items()}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def norm_shapes(config):
    """{name: shape} of the parameters of a norm."""
    d = config.n_embd
    return {
        "layernorm": {"weight": (d,), "bias": (d,)} if config.bias else {"weight": (d,)},
        "rmsnorm": {"weight": (d,)},
        "dyt": {"weight": (d,), "bias": (d,), "alpha": (1,)},
        "none": {},
    }[config.norm]


def block_shapes(config, query):
    """{name: shape} of the parameters of a block but for its norms; query: as of `GPTConfig.query`."""
    d, kv_width, n_mlp = config.n_embd, config.kv_heads * config.d_k, max(1, config.n_expert)
    q_width = d if query in ("trained", "linear") else 0
    k_width, v_width = (0 if is_identity else kv_width for is_identity in (config.wk_identity, config.wv_identity))
    linear = {
        "attn.c_attn": (q_width + k_width + v_width, d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (config.fc_width * n_mlp, d),
        "mlp.c_proj": (d, config.mlp_hidden * n_mlp),
    }
    if query == "mlp":
        linear |= {"attn.residual_in": (d // 2, d), "attn.residual_out": (d, d // 2)}
    block = {f"{layer}.weight": shape for layer, shape in linear.items()}
    if query == "mlp":
        block |= {f"attn.residual_{norm}.weight": (d,) for norm in ("rmsnorm_input", "layernorm_output")}
    if config.bias:
        block |= {f"{layer}.bias": shape[:1] for layer, shape in linear.items()}
        if query == "mlp":
            block["attn.residual_layernorm_output.bias"] = (d,)
    if config.n_expert:
        block["mlp.router.weight"] = (config.n_expert, d)
    return block


def check_parameters(model):
    """Raise ValueError, with the name, unless a GPT has the parameters of `known_shapes` and no others, nor buffers."""
    known, state = known_shapes(model.config, len(model.transformer.h)), model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if not name.endswith(BUFFERS)]
    for name in [*state, *buffers]:
        if name not in known:
            raise ValueError(
                f"theory/ must know every parameter of the model, got {name}: say in theory/weights.py what the "
                "results do with it, or use a model without it"
            )
    for name, shape in known.items():
        if name not in state or state[name].shape != shape:
            got = f"one of shape {tuple(state[name].shape)}" if name in state else "none"
            raise ValueError(
                f"the model must have a parameter {name} of shape {shape}, got {got}: use the model.py and the options "
                "with which it was trained"
            )


def read_weights(model, options=OPTIONS):
    """The Weights of a GPT. They may share memory with the model: replace entries, never change them in place.

    options: OPTIONS, or those of what the caller does. Raises ValueError, with the name, for an option or a parameter
    that is not known here (`check_known`), and for a weight that is not finite.
    """
    check_known(model, options)
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


def build_model(weights, config, like, unit_norms=False):
    """A GPT with this config and these Weights; other parameters, dtype, device and mode are those of the GPT `like`.

    unit_norms: the norms are those of a new model, with gains of 1 and without shifts. Raises ValueError if weights
    have a non-zero bias where a GPT with this config has none.
    """
    kept = () if unit_norms else KEPT
    state = {name: tensor for name, tensor in like.state_dict().items() if any(part in name for part in kept)}

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
    if unit_norms:
        state |= {name: tensor for name, tensor in built.state_dict().items() if ".ln_" in name}
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
