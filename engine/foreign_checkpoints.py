"""Checkpoints of nanoGPT and of the paper's authors (arXiv 2510.23912 and 2603.13381), in our terms.

Both are dicts with `model`, `model_args`, `iter_num` and `best_val_loss`. Their weights have our names, after a prefix
where the model was wrapped by torch.compile or for data parallelism.
"""

import math

import torch

WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of a weight's name
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of nanoGPT's attention where PyTorch has no FlashAttention
TRAINING = {  # options among the authors' model_args that are not the model's
    *("batch_size", "accumulation_size", "learning_rate", "min_lr", "decay_lr", "warmup_iters", "lr_decay_iters"),
    *("max_iters", "weight_decay", "beta1", "beta2", "grad_clip", "save_checkpoint_steps", "init_from", "seed"),
}
AUTHORS = {"num_heads", "head_size", "mlp_hidden_size", "query_mode", "use_query_weights", "scale"}
QUERY_MODES = {  # -> options
    "original": dict(wq_identity=False),
    "identity": dict(wq_identity=True),
    "residual": dict(wq_identity=True, query_residual="linear"),
    "residual_gelu": dict(wq_identity=True, query_residual="mlp"),
}


def convert(state):
    """nanoGPT's or the authors' checkpoint as one of ours: `model`, `model_config`, `step`, `best_val_loss`.

    Raises ValueError, with a clause about the file, for what it lacks and for a model that GPTConfig cannot describe.
    """
    for name in ("model", "model_args"):
        entry = state.get(name)
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise ValueError(f"its entry {name} must be a dict with names as keys, got {type(entry).__name__}")
    model = {}
    for prefixed, weight in state["model"].items():
        name = ".".join(part for part in prefixed.split(".") if part not in WRAPPERS)
        if name in model:
            raise ValueError(f"its entry model has the weight {name} twice, with different prefixes")
        if not name.endswith(MASKS):
            model[name] = weight
    embedding = model.get("transformer.wte.weight")
    if not isinstance(embedding, torch.Tensor) or embedding.dim() != 2:
        raise ValueError("its entry model has no matrix transformer.wte.weight: it is not a GPT of nanoGPT's form")
    model.setdefault("lm_head.weight", embedding)

    options = {name: value for name, value in state["model_args"].items() if name not in TRAINING}
    if AUTHORS & set(options):
        options = _from_authors(options, model)
    options.setdefault("tie_weights", have_equal_values(embedding, model["lm_head.weight"]))
    options.setdefault("bias", "transformer.ln_f.bias" in model)
    if options.get("vocab_size") is None:
        options["vocab_size"] = len(embedding)
    missing = [name for name in ("n_layer", "n_head", "n_embd", "block_size") if options.get(name) is None]
    if missing:
        raise ValueError(f"its model_args lack {', '.join(missing)}")
    converted = {"model": model, "model_config": options, "step": _number(state.get("iter_num", 0))}
    if "best_val_loss" in state:
        converted["best_val_loss"] = _number(state["best_val_loss"])
    return converted


def _from_authors(args, model):
    """Fields of GPTConfig for the authors' model_args: those of AUTHORS translated, the others as they are."""
    options = {name: value for name, value in args.items() if name not in AUTHORS}
    n_embd, n_head = (_positive(args, name, whole=True) for name in ("n_embd", "num_heads"))
    head_size = args.get("head_size")
    if head_size is not None and _positive(args, "head_size", whole=True) * n_head != n_embd:
        raise ValueError(
            f"its head_size must be n_embd/num_heads = {n_embd}/{n_head}, got {head_size}: models whose heads have "
            "another width cannot be loaded"
        )
    mode = args.get("query_mode")
    if mode is None:  # the older form
        mode = "original" if args.get("use_query_weights", True) else "identity"
    if not isinstance(mode, str) or mode not in QUERY_MODES:
        raise ValueError(f"its query_mode must be one of {', '.join(QUERY_MODES)}, got {shown(mode)}")
    options |= {"n_head": n_head, **QUERY_MODES[mode]}
    if args.get("mlp_hidden_size") is not None:
        hidden = _positive(args, "mlp_hidden_size", whole=True)
    else:  # the older form does not state it
        c_fc = model.get("transformer.h.0.mlp.c_fc.weight")
        hidden = len(c_fc) if isinstance(c_fc, torch.Tensor) and c_fc.dim() else 4 * n_embd
    options["mlp_ratio"] = hidden / n_embd
    if args.get("scale") is not None:  # of the attention logits; PyTorch's default is 1/√d_k
        options["attn_scale"] = round(_positive(args, "scale") * math.sqrt(n_embd / n_head), 12)
    return options


def _positive(args, name, whole=False):
    """The positive number called name in model_args."""
    value = args.get(name)
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(
            f"its model_args must have a positive {'whole number' if whole else 'number'} {name}, got {value!r}"
        )
    return value


def shown(value):
    """A value in an error message: itself where it is short, else its type."""
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def have_equal_values(a, b):
    """Whether two weights are one tensor or have the same values; reads them only where their first rows are equal."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if (a.shape, a.dtype, a.layout, a.device) != (b.shape, b.dtype, torch.strided, b.device):
        return False
    return a.data_ptr() == b.data_ptr() or (torch.equal(a[:1], b[:1]) and torch.equal(a, b))


def _number(value):
    """A tensor with one element, or a whole float, as the plain number that it is; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value
