"""Which stock class of the transformers library computes what a model of ours does, and the weights of each in both.

No class has an identity projection, our attention scale, or keys and values that are shared: they are written out. So
W_Q = I is the matrix attn_scale·I, and a trained W_Q is multiplied by attn_scale, as is its bias. Between the two forms
is the *full* one: name -> tensor, with each layer's own weights, Q, K and V apart, and a bias, be it zeros, in each
linear layer of a block and each LayerNorm.
"""

import dataclasses
import math
from dataclasses import dataclass, field

import torch

from model import GPT, GPTConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu_squared": "relu2"}
ACTIVATIONS["swiglu"] = "silu"  # of a gate
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
LINEAR_QUERIES = ("trained", "identity", "linear", "rotation")  # each is X times one matrix
# Fields of GPTConfig whose meaning is in the sizes, the weights or the class, so that any value can be written; every
# other one must have its default, or the value in REFUSED's terms.
WRITTEN = {
    *("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp_ratio", "dropout", "bias"),
    *("tie_weights", "wq_identity", "attn_scale", "activation", "wk_identity", "wv_identity", "query_residual"),
    *("query_rotation", "wq_identity_from", "share_kv", "attn_logit_std", "norm", "pos", "parallel", "share_layers"),
    *("causal", "n_expert_active", "load_balance"),
}
REFUSED = {  # field -> (the values that a class has, why it has no others)
    "n_expert": ((0,), "the experts of stock mixtures of experts are gated, and these are not"),
    "norm": (("layernorm", "rmsnorm"), "no stock class has Dynamic Tanh, or no normalisation, in its place"),
    "attn_skip": ((True,), "every stock class has the skip connection around attention"),
    "mlp_skip": ((True,), "every stock class has the skip connection around the MLP"),
    "query_residual": ((None, "linear"), "no stock class has an MLP in its queries"),
    "qk_norm": ((False,), "the stock classes that normalise queries and keys have gated MLPs"),
}
# What a run is made of beside its sizes, which an export records and an import returns to where the weights agree.
STRUCTURE = (
    *("bias", "n_kv_head", "wq_identity", "wq_identity_from", "wk_identity", "wv_identity", "share_kv"),
    *("share_layers", "pos", "attn_scale", "attn_logit_std"),
)
FOLDED = dict(wq_identity=False, wq_identity_from=0, attn_scale=1.0, attn_logit_std=None)  # all of it is in W_Q
QKV = "attn.q attn.k attn.v"
GATED = ("swiglu",)


@dataclass(frozen=True)
class StockClass:
    """A class of transformers: which models of ours it holds, and the names of their parts in it."""

    name: str
    options: dict  # what a model must be: field of GPTConfig -> its values; the first is that of a foreign model
    settings: dict  # a name in its configuration -> the attribute of GPTConfig that it is
    modules: dict  # our modules -> its module; {i}: the layer; several are one after the other in its rows
    fixed: dict = field(default_factory=dict)  # a name in its configuration -> the only value that a model of ours has
    transposed: bool = False  # its linear layers of a block store the transpose
    repeats_heads: bool = False  # keys and values need as many heads as queries
    multi_query: bool = False  # it is for one head of keys and values
    ones: str = ""  # a linear layer whose output must be 1: no weights, biases of 1

    def fits(self, config):
        """Whether a model with this GPTConfig is one of its."""
        is_multi_query = config.kv_heads == 1 < config.n_head
        return all(getattr(config, name) in values for name, values in self.options.items()) and (
            self.multi_query == is_multi_query or not (self.multi_query or self.repeats_heads)
        )


GPT2_SETTINGS = {
    **dict(vocab_size="vocab_size", n_embd="n_embd", n_layer="n_layer", n_head="n_head", n_positions="block_size"),
    **dict(n_inner="mlp_hidden", activation_function="activation", tie_word_embeddings="tie_weights"),
    **dict(resid_pdrop="dropout", embd_pdrop="dropout", attn_pdrop="dropout"),
}
GPT2_MODULES = {
    **{"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "lm_head": "lm_head"},
    **{QKV: "transformer.h.{i}.attn.c_attn", "attn.c_proj": "transformer.h.{i}.attn.c_proj"},
    **{"mlp.c_fc": "transformer.h.{i}.mlp.c_fc", "mlp.c_proj": "transformer.h.{i}.mlp.c_proj"},
    **{"ln_1": "transformer.h.{i}.ln_1", "ln_2": "transformer.h.{i}.ln_2"},
}
ROTARY_SETTINGS = {
    **dict(vocab_size="vocab_size", hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head"),
    **dict(num_key_value_heads="kv_heads", max_position_embeddings="block_size", intermediate_size="mlp_hidden"),
    **dict(hidden_act="activation", tie_word_embeddings="tie_weights", attention_dropout="dropout"),
}
ROTARY_MODULES = {
    **{"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"},
    **{f"attn.{part}": f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"},
    **{"attn.c_proj": "model.layers.{i}.self_attn.o_proj"},
    **{"ln_1": "model.layers.{i}.input_layernorm", "ln_2": "model.layers.{i}.post_attention_layernorm"},
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
GPT2_FIXED = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, add_cross_attention=False)
UNGATED = dict(activation=tuple(name for name in ACTIVATIONS if name not in GATED))
DECODER = dict(causal=(True,))

CLASSES = (
    StockClass(
        "GPT2LMHeadModel",
        UNGATED | DECODER | dict(norm=("layernorm",), pos=("learned", "none"), parallel=(False,)),
        GPT2_SETTINGS,
        GPT2_MODULES,
        GPT2_FIXED | dict(scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False),
        transposed=True,
        repeats_heads=True,
    ),
    StockClass(
        "GPTBigCodeForCausalLM",
        UNGATED | DECODER | dict(norm=("layernorm",), pos=("learned", "none"), parallel=(False,)),
        GPT2_SETTINGS,
        GPT2_MODULES,
        GPT2_FIXED | dict(multi_query=True),
        multi_query=True,
    ),
    StockClass(
        "Starcoder2ForCausalLM",
        UNGATED | DECODER | dict(norm=("layernorm",), pos=("rope",), parallel=(False,)),
        ROTARY_SETTINGS | dict(use_bias="bias", residual_dropout="dropout", embedding_dropout="dropout"),
        ROTARY_MODULES | {f"mlp.{part}": f"model.layers.{{i}}.mlp.{part}" for part in ("c_fc", "c_proj")},
        dict(norm_epsilon=1e-5, sliding_window=None, rope_parameters=ROTARY),
    ),
    StockClass(
        "PhiForCausalLM",
        UNGATED | DECODER | dict(norm=("layernorm",), pos=("rope",), parallel=(True,)),
        ROTARY_SETTINGS | dict(resid_pdrop="dropout", embd_pdrop="dropout"),
        {name: module for name, module in ROTARY_MODULES.items() if name != "ln_2"}
        | {"ln_f": "model.final_layernorm", "attn.c_proj": "model.layers.{i}.self_attn.dense"}
        | {"mlp.c_fc": "model.layers.{i}.mlp.fc1", "mlp.c_proj": "model.layers.{i}.mlp.fc2"},
        dict(layer_norm_eps=1e-5, qk_layernorm=False, rope_parameters=ROTARY | {"partial_rotary_factor": 1.0}),
    ),
    StockClass(
        "ArceeForCausalLM",  # a Llama whose MLP has no gate
        UNGATED | DECODER | dict(norm=("rmsnorm",), pos=("rope",), parallel=(False,)),
        ROTARY_SETTINGS | dict(attention_bias="bias", mlp_bias="bias", head_dim="d_k"),
        ROTARY_MODULES | {"mlp.c_fc": "model.layers.{i}.mlp.up_proj", "mlp.c_proj": "model.layers.{i}.mlp.down_proj"},
        dict(rms_norm_eps=1e-5, rope_parameters=ROTARY),
    ),
    StockClass(
        "LlamaForCausalLM",
        DECODER | dict(activation=GATED, norm=("rmsnorm",), pos=("rope",), parallel=(False,)),
        ROTARY_SETTINGS | dict(attention_bias="bias", mlp_bias="bias", head_dim="d_k"),
        ROTARY_MODULES
        | {"mlp.gate": "model.layers.{i}.mlp.gate_proj", "mlp.c_fc": "model.layers.{i}.mlp.up_proj"}
        | {"mlp.c_proj": "model.layers.{i}.mlp.down_proj"},
        dict(rms_norm_eps=1e-5, rope_parameters=ROTARY),
    ),
    StockClass(
        "EuroBertForMaskedLM",
        UNGATED | dict(causal=(False,), norm=("rmsnorm",), pos=("rope",), parallel=(False,)),
        ROTARY_SETTINGS | dict(attention_bias="bias", head_dim="d_k"),
        ROTARY_MODULES | {"mlp.c_fc": "model.layers.{i}.mlp.gate_proj", "mlp.c_proj": "model.layers.{i}.mlp.down_proj"},
        dict(rms_norm_eps=1e-5, mlp_bias=True, rope_parameters=ROTARY),
        ones="model.layers.{i}.mlp.up_proj",
    ),
)


def class_of(config):
    """The StockClass that holds models with a GPTConfig. Raises ValueError, with the reason, where there is none."""
    for option in dataclasses.fields(config):
        name, value = option.name, getattr(config, option.name)
        values, why = REFUSED.get(name, ((option.default,), "the export does not know this option"))
        if (name in REFUSED or name not in WRITTEN) and value not in values:
            raise ValueError(f"a model with {name}={value} has no class in transformers: {why}")
    for stock in CLASSES:
        if stock.fits(config):
            return stock
    if config.activation in GATED:
        why = "the stock class with such a gate is Llama's, with norm=rmsnorm, pos=rope, parallel=False and causal=True"
    elif not config.causal:
        why = "the stock encoder with such a head has norm=rmsnorm, pos=rope and parallel=False"
    elif config.parallel:
        why = "the stock class with parallel=True has norm=layernorm and pos=rope"
    else:
        why = "the stock class with norm=rmsnorm has pos=rope"
    options = ", ".join(
        f"{name}={getattr(config, name)}" for name in ("norm", "pos", "parallel", "causal", "activation")
    )
    raise ValueError(f"a model with {options} has no class in transformers: {why}")


def settings(stock, config, **more):
    """The configuration of a stock class for a GPTConfig: a dict, of what is not the class's own default."""
    values = {theirs: getattr(config, ours) for theirs, ours in stock.settings.items()}
    activation = next(theirs for theirs, ours in stock.settings.items() if ours == "activation")
    values[activation] = ACTIVATIONS[config.activation]
    if "n_positions" in values:
        values["n_ctx"] = config.block_size  # which llama.cpp's converter reads
    if "partial_rotary_factor" in stock.fixed.get("rope_parameters", {}):
        values["partial_rotary_factor"] = 1.0  # this class reads it here, too
    return values | stock.fixed | more


def plain_config(stock, theirs):
    """The GPTConfig of a model of a stock class, with all projections, and with biases.

    theirs: its configuration, an object of transformers. Raises ValueError for what no model of ours has.
    """
    for name, value in stock.fixed.items():
        got = getattr(theirs, name)
        if isinstance(value, dict):
            got, value = ({"partial_rotary_factor": 1.0} | each for each in (got, value))
        if got != value:
            raise ValueError(f"its {name} must be {value}, got {got}: no model of ours computes that")
    found = {ours: getattr(theirs, name) for name, ours in reversed(stock.settings.items())}
    known = {theirs: ours for theirs, ours in OUR_ACTIVATIONS.items() if ours in stock.options["activation"]}
    if found["activation"] not in known:
        raise ValueError(
            f"its activation must be one of {', '.join(known)}, got {found['activation']!r}: no model of ours has it"
        )
    found["activation"] = known[found["activation"]]
    hidden = found.pop("mlp_hidden") or 4 * found["n_embd"]
    heads = found.pop("kv_heads", 1 if stock.multi_query else found["n_head"])
    if found.pop("d_k", None) not in (None, found["n_embd"] // found["n_head"]):
        raise ValueError(f"its head_dim must be n_embd/n_head = {found['n_embd']}/{found['n_head']}")
    options = {name: values[0] for name, values in stock.options.items() if name not in found}
    sizes = dict(mlp_ratio=hidden / found["n_embd"], n_kv_head=None if heads == found["n_head"] else heads)
    return GPTConfig(**found | options | sizes | dict(bias=True))


def expanded(model, repeats_heads=False):
    """The weights of a GPT in the full form, name -> tensor (module's docstring).

    repeats_heads: keys and values get a head for each of the queries', a copy of the one that these share.
    """
    config, full = model.config, {}
    eye = torch.eye(config.n_embd, dtype=model.lm_head.weight.dtype)
    copies = config.n_head // config.kv_heads if repeats_heads else 1

    def put(name, module):
        full[f"{name}.weight"] = module.weight.detach()
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()
            full[f"{name}.bias"] = bias

    def repeated(rows):
        return rows.unflatten(0, (-1, config.d_k)).repeat_interleave(copies, 0).flatten(0, 1) if copies > 1 else rows

    for name in ("wte", "ln_f"):
        put(name, model.transformer[name])
    positions = model.transformer["wpe"].weight.detach() if config.pos == "learned" else None
    if config.pos != "rope":
        full["wpe.weight"] = torch.zeros(config.block_size, config.n_embd) if positions is None else positions
    full["lm_head.weight"] = model.lm_head.weight.detach()
    for layer, number in enumerate(model.order):
        block = model.transformer.h[number]
        attention, kind, scale = block.attn, config.query(number), config.attn_scale_in(number)
        assert kind in LINEAR_QUERIES
        for name in ("ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            if name != "ln_2" or not config.parallel:
                put(f"h.{layer}.{name}", block.get_submodule(name))
        if config.activation in GATED:  # the first half of the rows is the gate
            for part in ("weight", "bias"):
                both = full[f"h.{layer}.mlp.c_fc.{part}"]
                full[f"h.{layer}.mlp.gate.{part}"], full[f"h.{layer}.mlp.c_fc.{part}"] = both.chunk(2)
        q, k, v = (rows.detach() for rows in attention.split_qkv(attention.c_attn.weight, dim=0))
        q = attention.query(eye, q.T).T.detach()  # the product of the identity with W_Q is W_Q
        full[f"h.{layer}.attn.q.weight"] = q * scale
        full[f"h.{layer}.attn.k.weight"] = k = eye if config.wk_identity else repeated(k)
        full[f"h.{layer}.attn.v.weight"] = eye if config.wv_identity else k if config.share_kv else repeated(v)
        biases = [torch.zeros(width) for width in attention.widths]
        if config.bias:
            biases = [part.detach() for part in attention.split_qkv(attention.c_attn.bias)]
        q, k, v = biases
        none = torch.zeros(config.n_embd)
        full[f"h.{layer}.attn.q.bias"] = q * scale if attention.has_wq else none
        full[f"h.{layer}.attn.k.bias"] = k = none if config.wk_identity else repeated(k)
        full[f"h.{layer}.attn.v.bias"] = none if config.wv_identity else k if config.share_kv else repeated(v)
    return full


def contracted(config, full):
    """Our state dict of a GPTConfig, whose queries are trained or the identity, from weights in the full form.

    What the configuration says to be an identity, zeros or a copy is left out, whether it is or not.
    """
    weights = {}

    def put(name, source, rows=None):
        for part in ("weight", "bias"):
            tensor = full.get(f"{source}.{part}")
            if tensor is not None and (part == "weight" or config.bias):
                weights[f"{name}.{part}"] = tensor if rows is None else rows(tensor)

    def first_of_copies(rows):
        heads = rows.unflatten(0, (-1, config.d_k))
        return heads[:: len(heads) // config.kv_heads].flatten(0, 1)

    for name in ("wte", *(["wpe"] if config.pos == "learned" else []), "ln_f"):
        put(f"transformer.{name}", name)
    for layer in range(1 if config.share_layers else config.n_layer):
        for name in ("ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            put(f"transformer.h.{layer}.{name}", f"h.{layer}.{name}")
        for part in ("weight", "bias"):
            name = f"transformer.h.{layer}.mlp.c_fc.{part}"
            if config.activation in GATED and name in weights:
                weights[name] = torch.cat([full[f"h.{layer}.mlp.gate.{part}"], weights[name]])
        scale, kept = config.attn_scale_in(layer), []
        if config.query(layer) == "trained":
            kept.append(lambda part, layer=layer, scale=scale: full[f"h.{layer}.attn.q.{part}"] / scale)
        for name, is_left_out in (("k", config.wk_identity), ("v", config.wv_identity or config.share_kv)):
            if not is_left_out:
                kept.append(lambda part, at=f"h.{layer}.attn.{name}": first_of_copies(full[f"{at}.{part}"]))
        for part in ("weight", *(["bias"] if config.bias else [])):
            weights[f"transformer.h.{layer}.attn.c_attn.{part}"] = torch.cat([rows(part) for rows in kept])
    head = "wte.weight" if config.tie_weights else "lm_head.weight"
    return weights | {"lm_head.weight": full[head]}


def to_stock(stock, full, expected):
    """Weights in the full form under the names of a stock class. expected: name -> tensor of its own state dict."""
    weights = {}
    n_layer = sum(name.endswith(".attn.q.weight") for name in full)
    for ours, theirs in stock.modules.items():
        for layer in range(n_layer if "{i}" in theirs else 1):
            prefix = f"h.{layer}." if "{i}" in theirs else ""
            name = theirs.format(i=layer)
            for part in ("weight", "bias"):
                target = f"{name}.{part}"
                if target not in expected:
                    continue
                if f"{prefix}{ours.split()[0]}.{part}" in full:
                    tensor = torch.cat([full[f"{prefix}{each}.{part}"] for each in ours.split()])
                else:  # a bias that our models do not have
                    tensor = torch.zeros(expected[target].shape)
                is_transposed = stock.transposed and part == "weight" and tensor.dim() == 2 and prefix
                weights[target] = (tensor.T if is_transposed else tensor).clone().contiguous()
    for layer in range(n_layer if stock.ones else 0):
        name = stock.ones.format(i=layer)
        weights[f"{name}.weight"] = torch.zeros(expected[f"{name}.weight"].shape)
        weights[f"{name}.bias"] = torch.ones(expected[f"{name}.bias"].shape)
    return weights


def from_stock(stock, config, weights):
    """The full form of a stock class's weights, all of them. Raises ValueError for what no model of ours has."""
    full = {}
    kv_width = config.kv_heads * config.d_k
    for ours, theirs in stock.modules.items():
        names = ours.split()
        widths = [config.n_embd, kv_width, kv_width] if len(names) > 1 else None
        for layer in range(config.n_layer if "{i}" in theirs else 1):
            prefix, name = f"h.{layer}." if "{i}" in theirs else "", theirs.format(i=layer)
            weight, bias = (weights.get(f"{name}.{part}") for part in ("weight", "bias"))
            if stock.transposed and weight.dim() == 2 and prefix:
                weight = weight.T
            if ours == "lm_head":
                if bias is not None and bias.any():
                    raise ValueError(f"its LM head has the bias {name}.bias, and ours have none")
                bias = None
            elif bias is None and prefix and not ours.startswith("ln"):
                bias = torch.zeros(len(weight))
            for part, tensor in (("weight", weight), ("bias", bias)):
                if tensor is not None:
                    parts = tensor.split(widths) if widths else [tensor]
                    full |= {f"{prefix}{each}.{part}": rows for each, rows in zip(names, parts, strict=True)}
    for layer in range(config.n_layer if stock.ones else 0):
        name = stock.ones.format(i=layer)
        if weights[f"{name}.weight"].any() or (weights[f"{name}.bias"] != 1).any():
            raise ValueError(f"its MLP has a gate, {name}.weight, and ours have none")
    return full


def ours_from(stock, theirs, weights, recorded=None):
    """(GPTConfig, state dict) of a model of a stock class.

    theirs: its configuration. weights: name -> tensor. recorded: the model options that an export noted; where the
    weights still are, to the bit, what the export of such a model would be, it is that model: W_Q = I is an option
    again, not a matrix. Else every projection and bias is a matrix. Raises ValueError for what no model of ours has.
    """
    has_biases = any(name.endswith(".bias") for name in weights)
    plain = dataclasses.replace(plain_config(stock, theirs), bias=has_biases)
    full = from_stock(stock, plain, weights)
    for config in [*candidates(plain, recorded or {}), plain]:
        state = contracted(config, full)
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(state, assign=True)
        again = expanded(model, stock.repeats_heads)
        if again.keys() == full.keys() and all(torch.equal(again[name], full[name]) for name in full):
            break
    return config, state


def candidates(plain, recorded):
    """GPTConfigs that a model with the configuration `plain` may have been exported from, the likeliest first."""
    structure = {name: recorded[name] for name in STRUCTURE if name in recorded}
    found = []
    for changes in ({}, FOLDED):
        try:
            config = dataclasses.replace(plain, **structure | changes)
        except (ValueError, TypeError):  # of another version, or written by hand
            continue
        scales = [config.attn_scale_in(i) for i in range(config.n_layer) if config.query(i) == "trained"]
        if all(math.frexp(scale)[0] == 0.5 for scale in scales):  # else dividing by it does not give W_Q back
            found.append(config)
    return found
