"""What a checkpoint holds, how it is written so that a crash never costs one, and how it is read without pickle.

A checkpoint is a flat dict of tensors and plain values: `format`, `model` (raw parameter names), `model_config`,
`optimizer`, `scaler`, `step`, `rng`, `best_val_loss`, `config`, `data_fingerprint`.
"""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import torch

from model import GPT, GPTConfig

FORMAT = 1


def save(path, **state):
    """Write a checkpoint to path: to a temporary file beside it, flushed to disk, then renamed over it.

    Raises ValueError, with the one before intact, when it cannot be written (a full disk, say).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot write the checkpoint {path}: {reason}; the one before, if any, is intact") from error
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def link(path, name):
    """Make `name`, beside path, the checkpoint that path is now: a hard link, or a copy where links are not known."""
    path = Path(path)
    temporary = path.with_name(f".{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copy2(path, temporary)
    os.replace(temporary, path.with_name(name))


def load(path, map_location="cpu"):
    """The dict in a checkpoint file; one that nanoGPT wrote comes back in our terms, with the entries that it has.

    Raises ValueError when there is no such file, when it cannot be read, or when it is another program's.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read the checkpoint {path}: {reason}") from error
    if isinstance(state, dict) and "model_args" in state:
        state = _from_nanogpt(state)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}")
    return state


def build_model(state):
    """A GPT with a checkpoint's configuration and weights. Raises ValueError when the two do not fit together."""
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown = sorted(set(state["model_config"]) - known)
    if unknown:
        raise ValueError(f"the checkpoint's model has options that this version does not know: {', '.join(unknown)}")
    model = GPT(GPTConfig(**state["model_config"]))
    load_weights(model, state)
    return model


def load_weights(model, state):
    """Put a checkpoint's weights into model. Raises ValueError, naming the options that differ, if they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        here, there = dataclasses.asdict(model.config), state["model_config"]
        differences = differing(there, here)
        reason = "; ".join(differences) or " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint's weights do not fit the model: {reason}") from error


def check_same_run(state, config, path):
    """What config, a dict of TrainConfig's fields, changes of a run's checkpoint, as a list of texts.

    Raises ValueError unless it can go on with it: the model, the seeds and tokens_per_step make a run what it is.
    """
    fixed = [*state["model_config"], "seed", "data_seed", "tokens_per_step"]
    differences = differing(state["config"], {name: config[name] for name in fixed})
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. Repeat its options, or choose another --out_dir"
        )
    if state["step"] > config["max_iters"]:
        raise ValueError(f"{path} has {state['step']} steps already, more than max_iters={config['max_iters']}")
    about_the_call = ("resume", "eval_only", "out_dir")
    return differing(state["config"], {name: config[name] for name in config if name not in about_the_call})


def differing(there, here):
    """'name is A in the checkpoint and B here' for each name in both dicts whose values differ."""
    return [
        f"{name} is {there[name]} in the checkpoint and {here[name]} here"
        for name in here
        if name in there and there[name] != here[name]
    ]


def _from_nanogpt(state):
    prefix = "_orig_mod."  # torch.compile's, which nanoGPT leaves in place
    model = {name.removeprefix(prefix): tensor for name, tensor in state["model"].items()}
    tied = torch.equal(model["transformer.wte.weight"], model["lm_head.weight"])
    return {
        "format": FORMAT,
        "model": model,
        "model_config": {**state["model_args"], "tie_weights": tied},
        "step": state.get("iter_num", 0),
    }


def model_options(path):
    """The model options of a checkpoint file. Raises ValueError (`load`)."""
    return load(path)["model_config"]
