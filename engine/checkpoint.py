"""What a checkpoint contains, how it is written so that a crash never costs one, and how it is read and checked.

A checkpoint is a flat dict of tensors and plain values: `format`, `model` (raw parameter names), `model_config`,
`optimizer`, `scaler`, `step`, `rng`, `best_val_loss`, `config`, `data_fingerprint`. Its file: `torch_file.py`; those of
nanoGPT and of the paper's authors: `foreign_checkpoints.py`.
"""

import dataclasses

import torch

import configurator
from engine import foreign_checkpoints, torch_file
from engine.files import write_atomically
from model import GPT, GPTConfig

FORMAT = 1
OF_A_MODEL = ("model", "model_config", "step")  # the entries that a checkpoint of a GPT has
TYPES = {  # of the entries that there are
    **dict.fromkeys(("model", "model_config", "optimizer", "scaler", "rng", "config"), (dict, "a dict")),
    **dict.fromkeys(("best_val_loss", "train_seconds", "wall_seconds"), ((int, float), "a number")),
    "step": (int, "a whole number"),
    "data_fingerprint": (str, "text"),
    "links": (list, "a list"),
}
PARTS = {"optimizer": ("param_groups", list), "rng": ("cpu", torch.Tensor)}  # what these entries must have
MAX_DEPTH, MAX_VALUES = 16, 10**6  # of nested dicts and lists, and of the values in them
OF_THE_WEIGHTS = (  # options on which the names, shapes or rows of the weights depend, beside block_size
    *("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp_ratio", "bias", "tie_weights", "wq_identity"),
    *("wk_identity", "wv_identity", "norm", "pos", "parallel", "share_layers", "n_expert"),
    *("query_residual", "query_rotation", "wq_identity_from", "share_kv"),
)
# Which decide what the rows of c_attn are, or what they are trained for.
ROWS = ("wq_identity", "wk_identity", "wv_identity", "query_residual", "query_rotation", "wq_identity_from", "share_kv")
POSITIONS = "transformer.wpe.weight"  # (block_size, n_embd)


def save(path, **state):
    """Write a checkpoint to path, whole or not at all.

    Raises ValueError, with the one before intact, when it cannot be written (a full disk, say).
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path, map_location="cpu", required=OF_A_MODEL):
    """The dict in a checkpoint file, with every model option in its `model_config`, and weights that fit these options.

    One of nanoGPT or of the paper's authors comes back in our terms, with the entries that it has. required: the
    entries that there must be. Raises ValueError, in one line with the path, when there is no such file, and for a file
    that is damaged (`torch_file.read`), of another kind, or without valid entries.
    """
    return _checked(torch_file.read(path, map_location), path, required)


def model_options(path):
    """name -> value of each field of GPTConfig, as a checkpoint has them; its weights are not read, as far as possible.

    Raises ValueError as `load` does, except for a damage among the weights.
    """
    return _without_weights(path)["model_config"]


def run_options(path):
    """name -> value of the fields of TrainConfig, as the run that saved a checkpoint had them; {} where none did."""
    return _without_weights(path).get("config", {})


def step(path):
    """The optimizer steps after which a checkpoint was saved."""
    return _without_weights(path)["step"]


def _without_weights(path):
    return _checked(torch_file.read(path, mmap=True), path, required=OF_A_MODEL)


def build_model(state):
    """A GPT with a checkpoint's configuration and weights. Raises ValueError when the two do not fit together."""
    model = GPT(_model_config(state["model_config"]))
    load_weights(model, state)
    return model


def load_weights(model, state):
    """Put a checkpoint's weights into model, which may have a smaller block_size: learned positions are cropped to it.

    Other options may differ where the weights have a place for them (n_head, dropout, attn_scale, …).
    Raises ValueError, naming the options that differ, if the weights do not fit.
    """
    here, there = model.config, _model_config(state["model_config"])
    weights, expected = dict(state["model"]), model.state_dict()
    if here.pos == there.pos == "learned" and POSITIONS in weights:
        if here.block_size > there.block_size:
            raise ValueError(
                f"block_size must be at most {there.block_size}, as many positions as the checkpoint has learned, got "
                f"{here.block_size}"
            )
        weights[POSITIONS] = weights[POSITIONS][: here.block_size]
    problem = _misfit(weights, expected, here.tie_weights)
    if problem or any(getattr(here, name) != getattr(there, name) for name in ROWS):
        options = [{name: getattr(config, name) for name in OF_THE_WEIGHTS} for config in (there, here)]
        reason = "; ".join(differing(*options)) or problem
        raise ValueError(f"the checkpoint's weights do not fit the model: {reason}")
    model.load_state_dict(weights)


def differing(there, here):
    """'name is A in the checkpoint and B here' for each name in both dicts whose values differ."""
    return [
        f"{name} is {there[name]} in the checkpoint and {here[name]} here"
        for name in here
        if name in there and there[name] != here[name]
    ]


def _checked(state, path, required):
    """The dict that a file contains as a checkpoint of ours. Raises ValueError if it cannot be one."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} must contain a dict to be a checkpoint, got {type(state).__name__}")
    if not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} must contain a dict with names as keys to be a checkpoint")
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(
            f"{path} is a state dict, weights without the model's options: save it as nanoGPT does, "
            "{'model': weights, 'model_args': {'n_layer': …, 'n_head': …, 'n_embd': …, 'block_size': …}}"
        )
    _check_nesting(state, path)
    try:
        if "format" not in state and "model_args" in state:
            state = {"format": FORMAT, **foreign_checkpoints.convert(state)}
        form = state.get("format")
        if not isinstance(form, int) or form != FORMAT:
            names = ", ".join(sorted(state)[:8]) or "nothing"
            found = f"format {foreign_checkpoints.shown(form)}" if "format" in state else f"neither, but {names}"
            raise ValueError(f"it must have an entry format={FORMAT}, or model_args as nanoGPT's, got {found}")
        missing = [name for name in required if name not in state]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name, (kinds, wanted) in TYPES.items():
            value = state.get(name)
            if name in state and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"its entry {name} must be {wanted}, got {type(value).__name__}")
        for name, (part, kind) in PARTS.items():
            if name in state and not isinstance(state[name].get(part), kind):
                raise ValueError(f"its entry {name} must have {part}, a {kind.__name__.lower()}")
        _check_weights(state.get("model", {}))
        if "model_config" in state:
            config = _model_config(state["model_config"])
            with torch.device("meta"):  # names and shapes, without memory or random numbers
                expected = GPT(config).state_dict()
            problem = _misfit(state["model"], expected, config.tie_weights) if "model" in state else None
            if problem:
                raise ValueError(problem)
            state = {**state, "model_config": dataclasses.asdict(config)}
    except ValueError as error:
        raise ValueError(f"{path} is not a valid checkpoint: {error}") from error
    return state


def _check_nesting(state, path):
    """Raise ValueError for dicts and lists that are nested without end, or so that one would take all memory."""
    level = [state]
    for _ in range(MAX_DEPTH):
        inner = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                inner.extend(value)
        if not inner:
            return
        if len(inner) > MAX_VALUES:
            break
        level = inner
    raise ValueError(
        f"{path} is not a checkpoint: its dicts and lists are nested more than {MAX_DEPTH} deep, or have more than "
        f"{MAX_VALUES:,} values"
    )


def _check_weights(weights):
    """Raise ValueError unless weights is name -> dense tensor of floating-point numbers."""
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise ValueError(f"its entry model must be name -> tensor, got {name!r} -> {type(weight).__name__}")
        if not weight.is_floating_point() or weight.layout != torch.strided or weight.is_meta:
            kind = f"{weight.dtype}, {weight.layout} on {weight.device}".replace("torch.", "")
            raise ValueError(f"its weight {name} must be a dense tensor of floating-point numbers, got {kind}")


def _model_config(options):
    """The GPTConfig with a checkpoint's model options. Raises ValueError for unknown names, wrong types and values."""
    kinds = configurator.field_types(GPTConfig)
    unknown = sorted(str(name) for name in options if name not in kinds)
    if unknown:
        raise ValueError(f"its model has options that this version does not know: {', '.join(unknown)}")
    for name, value in options.items():
        if not isinstance(value, (int, float, str, type(None))):
            raise ValueError(f"its model option {name} must be a plain value, got {type(value).__name__}")
    where = "its model options"
    return GPTConfig(**{name: configurator.coerce(name, value, kinds[name], where) for name, value in options.items()})


def _misfit(weights, expected, tied):
    """How weights, name -> tensor, differ from a model's state dict in names and shapes, as a clause; None: they fit.

    tied: the LM head must be the embedding.
    """
    for names, what in (
        ([name for name in expected if name not in weights], "it lacks the weight"),
        ([name for name in weights if name not in expected], "its model options leave no place for the weight"),
    ):
        if names:
            return f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(weights[name].shape)
            return f"its weight {name} must have the shape {shapes[0]} by its model options, got {shapes[1]}"
    if tied and not foreign_checkpoints.have_equal_values(weights["transformer.wte.weight"], weights["lm_head.weight"]):
        return "tie_weights must be False, got True: its LM head is not its embedding"
    return None
