"""Rewrite a checkpoint without W_Q, W_K or W_V, exactly, where the paper's Section 4 allows it.

python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run-reduced/ckpt.pt
python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/no_wq.pt --gauge=orthonormal     loses least in bfloat16
python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/no_wk.pt --which=k --max_cond=1e5
python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/layer3.pt --layer=3              one layer's W_Q alone
python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/fitted.pt --approximate          where no theorem helps

Computes in float64; prints each layer's condition number and how far the logits of the two models are apart. The new
file has weights and configuration, no optimizer state, whose averages belong to the old weights. Where it lies in
another folder than the old one, run.json comes along, so that sample.py finds the tokenizer.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from engine import checkpoint, devices, run_files
from engine.files import read_json, write_json
from theory import reparametrize, trained_model

N_RANDOM = 8  # sequences of random tokens


@dataclass
class EliminateConfig:
    """Which checkpoint to rewrite, and how."""

    ckpt: str | None = None  # the checkpoint to rewrite, such as out/run/ckpt.pt
    out: str | None = None  # the file to write, which must not exist
    which: Literal["q", "k", "v"] = "q"  # the projection that becomes the identity: W_Q, W_K or W_V
    layer: int | None = None  # the only layer whose projection goes, from 0; none: all
    gauge: Literal["kept", "balanced", "orthonormal"] = "kept"  # the form of W_Q, W_K (Proposition 4.2) to begin with
    max_cond: float = reparametrize.MAX_COND  # the largest condition number of a matrix that is inverted
    approximate: bool = False  # not exact: W_Q = I and the W_K that fits training text best, to fine-tune from
    windows: int | None = 32  # validation windows on which models are compared, training windows of a fit; none: all
    data_dir: str | None = None  # where the text is; none: where the checkpoint says
    dataset: str | None = None  # the folder in data_dir, for a checkpoint that does not name its data

    def __post_init__(self):
        for name, meaning in (("ckpt", "the checkpoint to rewrite"), ("out", "the file to write")):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given: name {meaning} with --{name}=…")
        if self.max_cond < 1:
            raise ValueError(f"max_cond must be at least 1, the condition number of the identity, not {self.max_cond}")
        if self.approximate and (self.which, self.layer, self.gauge) != ("q", None, "kept"):
            raise ValueError(
                "approximate=True fits W_K to W_Q = I in all layers: leave which, layer and gauge as they are"
            )
        if self.approximate and self.windows is None:
            raise ValueError(
                "windows=none takes all of the training text for approximate=True: set a number, such as 256"
            )
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows must be at least 1, not {self.windows}")


def eliminate(cfg):
    """Rewrite cfg.ckpt into cfg.out and print the comparison; what was found, as a dict.

    Its entries: result (the theorem), cond ({layer: condition number of Θ}; empty where nothing is inverted),
    parameters ((before, after)), random and real ({dtype: a row of `compare`}; real is None without validation bins).
    Raises ValueError, with nothing written, when the files or the model do not allow it.
    """
    source, target = Path(cfg.ckpt), Path(cfg.out)
    if target.exists():
        raise ValueError(f"{target} exists already: choose another --out=…, or remove it")
    state = checkpoint.load(source)
    elsewhere = target.parent.resolve() != source.parent.resolve()
    if elsewhere and run_files.holds_run(target.parent):
        raise ValueError(f"{target.parent} holds another run: write to a folder without one, or to {source.parent}")
    model = checkpoint.build_model(state).eval()
    print(f"{source}, step {state['step']}: ", end="")
    original = copy.deepcopy(model).double()
    result, conditions, rewritten = (fit if cfg.approximate else rewrite)(original, state, cfg)
    reduced = copy.deepcopy(rewritten).float()

    before, after = model.num_params().total, reduced.num_params().total
    print(f"parameters: {before:,} → {after:,} ({after - before:+,})")
    if state["model_config"]["tie_weights"] and not reduced.config.tie_weights:
        print("embedding and LM head, which were tied, are two matrices now (Remark 2)")
    models = {torch.float64: (original, rewritten)} | dict.fromkeys([torch.float32, torch.bfloat16], (model, reduced))
    shape = (N_RANDOM, model.config.block_size)
    random_tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found = {"result": result, "cond": conditions, "parameters": (before, after)}
    found["random"] = compare(models, random_tokens, random_tokens)
    print_comparison("random tokens", found["random"])
    try:
        x, y = trained_model.recorded_windows(state, "val", cfg.windows, cfg.data_dir, cfg.dataset)
    except ValueError as error:
        print(f"real tokens: {str(error).partition('. ')[0]}")
        found["real"] = None
    else:
        found["real"] = compare(models, x, y)
        print_comparison(f"{len(x)} validation windows", found["real"])

    options = {name: getattr(cfg, name) for name in ("ckpt", "which", "layer", "gauge", "max_cond", "approximate")}
    write(target, source, state, reduced, {**options, **found})
    print(f"wrote {target}: python sample.py --out_dir={target.parent} --ckpt={target.name}")
    print(f"to train on: the run's options and {' '.join(changed_options(state, reduced))} --init_from={target}")
    return found


def rewrite(original, state, cfg):
    """The result that covers a GPT, {layer: condition number of Θ} and the GPT rewritten by it, as cfg says."""
    result = reparametrize.covering_result(original, cfg.which, cfg.layer)
    inverts = result in reparametrize.BY_CHANGE_OF_BASIS
    start = original if cfg.gauge == "kept" else reparametrize.change_gauge(original, cfg.gauge)
    conditions = reparametrize.condition_numbers(start, cfg.which, cfg.layer) if inverts else {}
    matrix = f"W_{cfg.which.upper()}"
    print(f"{matrix} = I by {result}{'' if inverts else ', which inverts nothing'}")
    for layer, condition in conditions.items():
        print(f"layer {layer}: condition number of {matrix} {condition:.4g}")
    return result, conditions, reparametrize.eliminate(start, cfg.which, cfg.layer, cfg.max_cond)


def fit(original, state, cfg):
    """As `rewrite`, by no theorem: W_Q = I and W_K fitted on the training text of the checkpoint `state`."""
    x, _ = trained_model.recorded_windows(state, "train", cfg.windows, cfg.data_dir, cfg.dataset)
    print(f"W_Q = I and a W_K fitted on {len(x)} training windows; not exact, to fine-tune from")
    fitted = trained_model.fit_keys(copy.deepcopy(original).float(), x)
    return "a fitted W_K", {}, trained_model.without_queries(fitted).double()


@torch.no_grad()
def compare(models, x, y):
    """How far the logits of two models are apart on x, (n, T) int64, and their losses on the targets y.

    models: {dtype: (original, rewritten)}; those of bfloat16 compute under autocast, as train.py and sample.py do.
    Returns {dtype: dict}: difference, the largest of any logit; relative, that divided by the largest logit; rounding,
    relative too, how far the original is from itself in float64; loss_before and loss_after, in nats a target.
    """
    rows = {dtype: dict.fromkeys(("difference", "largest", "rounding", "before", "after"), 0.0) for dtype in models}
    vocab_size = models[torch.float64][0].config.vocab_size
    batch_size = max(1, 2**24 // (x.size(1) * vocab_size))  # 128 MiB of float64 logits
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        reference, _ = models[torch.float64][0](inputs, targets)
        for dtype, pair in models.items():
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                (old, old_loss), (new, new_loss) = (model(inputs, targets, reduction="none") for model in pair)
            row, old = rows[dtype], old.double()
            row["difference"] = max(row["difference"], (new.double() - old).abs().max().item())
            row["rounding"] = max(row["rounding"], (old - reference).abs().max().item())
            row["largest"] = max(row["largest"], old.abs().max().item())
            row["before"] += old_loss.double().sum().item()
            row["after"] += new_loss.double().sum().item()
    n_targets = (y >= 0).sum().item()
    return {
        devices.dtype_name(dtype): {
            "difference": row["difference"],
            "relative": row["difference"] / row["largest"],
            "rounding": row["rounding"] / row["largest"],
            "loss_before": row["before"] / n_targets,
            "loss_after": row["after"] / n_targets,
        }
        for dtype, row in rows.items()
    }


def print_comparison(title, rows):
    """Print the result of `compare` as a table; the losses only where the tokens are real."""
    print(f"largest logit difference, {title}:")
    for dtype, row in rows.items():
        line = f"  {dtype:<8}  {row['difference']:.2e}, relative {row['relative']:.2e}"
        if dtype != "float64":
            line += f" (the original's own rounding: {row['rounding']:.2e})"
        if not title.startswith("random"):
            change = row["loss_after"] - row["loss_before"]
            line += f"; loss {row['loss_before']:.6f} → {row['loss_after']:.6f} ({change:+.1e})"
        print(line)


def changed_options(state, model):
    """The options of train.py that differ from those of the checkpoint."""
    old, new = state["model_config"], dataclasses.asdict(model.config)
    return [f"--{name}={value}" for name, value in new.items() if value != old.get(name, value)]


def write(target, source, state, model, eliminated):
    """Write the checkpoint of model to target and, in a folder without one, the run.json of source."""
    model_config = dataclasses.asdict(model.config)
    kept = {name: state[name] for name in ("step", "best_val_loss", "data_fingerprint") if name in state}
    if "config" in state:
        kept["config"] = {**state["config"], **model_config}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {target.parent}: {error.strerror}; choose another --out") from error
    checkpoint.save(target, model=model.state_dict(), model_config=model_config, eliminated=eliminated, **kept)
    run = read_json(source.parent / "run.json")
    if run is None:
        print(f"{source.parent} has no run.json, which names the tokenizer: sample.py will ask for it")
    elif not (target.parent / "run.json").exists():
        parameters = model.num_params()._asdict()
        write_json(target.parent / "run.json", {**run, "parameters": parameters, "eliminated": eliminated})


def main(argv):
    """The command; see the module's docstring."""
    eliminate(configurator.parse(EliminateConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
