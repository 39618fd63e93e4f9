"""Rewrite a checkpoint without W_Q, W_K or W_V: with the same logits where a result of the paper applies.

    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run-reduced/ckpt.pt
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/no_wq.pt --gauge=orthonormal     most precise in bfloat16
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/no_wk.pt --which=k --max_cond=1e5
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/layer3.pt --layer=3              only the W_Q of one layer
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/heads.pt --heads --rows=chosen     of any model, a part
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/triangular.pt --triangular --layer=0    through norms
    python eliminate.py --ckpt=out/run/ckpt.pt --out=out/run/fitted.pt --approximate          if no result applies

Computes in float64; prints each layer's condition number and how far the logits of the two models are apart. Without
--approximate nothing is written if that is more than rounding can explain (`theory/verification.py`). The new file
contains weights and configuration, but no optimizer state, which belongs to the old weights. If it is written to
another folder, run.json is copied there, so that sample.py finds the tokenizer.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
from configurator import FilePath, require
from engine import checkpoint, devices, run_files
from engine.files import read_json, write_json
from theory import gauge, orthogonal, reparametrize, trained_model, verification, weights

N_RANDOM = 8  # sequences of random tokens


@dataclass
class EliminateConfig:
    """Which checkpoint to rewrite, and how."""

    ckpt: FilePath | None = None  # the checkpoint to rewrite, such as out/run/ckpt.pt
    out: FilePath | None = None  # the file to write, which must not exist
    which: Literal["q", "k", "v"] = "q"  # the projection that becomes the identity: W_Q, W_K or W_V
    layer: int | None = None  # the only layer whose projection is removed, from 0; none: all layers
    gauge: Literal["kept", "balanced", "orthonormal"] = "kept"  # the initial form of the heads (Proposition 4.2)
    heads: bool = False  # in any model: d_k rows of each head of W_Q and of W_V become I, and need no storage
    rows: Literal["top", "chosen"] = "top"  # with heads: the first d_k, or d_k that lose little in low precision
    triangular: bool = False  # norms included: W_Q of the layer that `layer` names becomes upper triangular
    max_cond: float = reparametrize.MAX_COND  # the largest condition number of a matrix that is inverted
    approximate: bool = False  # not exact: W_Q = I and the W_K that fits training text best, for fine-tuning
    windows: int | None = 32  # validation windows for the comparison, training windows for a fit; none: all
    data_dir: FilePath | None = None  # where the text is; none: the checkpoint's data_dir
    dataset: str | None = None  # the folder in data_dir; needed if the checkpoint does not name its dataset

    def __post_init__(self):
        for name, meaning in (("ckpt", "the checkpoint to rewrite"), ("out", "the file to write")):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given: name {meaning} with --{name}=…")
        require(self, positive="windows")
        if not self.max_cond >= 1:
            raise ValueError(f"max_cond must be at least 1, the condition number of the identity, got {self.max_cond}")
        ways = [name for name in ("heads", "triangular", "approximate") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are different ways to rewrite a model: set one of them")
        if self.rows != "top" and not self.heads:
            raise ValueError(f"rows={self.rows} says which rows become I with heads=True: set that, too")
        layer = None if self.triangular else self.layer
        if ways and (self.which, layer, self.gauge) != ("q", None, "kept"):
            what = {
                "heads": "acts on W_Q and W_V of all layers",
                "triangular": "acts on W_Q",
                "approximate": "replaces W_Q in all layers",
            }[ways[0]]
            names = "which and gauge" if self.triangular else "which, layer and gauge"
            raise ValueError(f"{ways[0]}=True {what}: leave {names} at their defaults")
        if self.triangular and self.layer is None:
            raise ValueError("triangular=True acts on one layer, as all have one basis: name it with --layer=…")
        if self.approximate and self.windows is None:
            raise ValueError("windows must be a number with approximate=True, such as 256, got none (all of it)")


def eliminate(cfg):
    """Rewrite cfg.ckpt to cfg.out and print a comparison of the two models; returns what was found as a dict.

    result: the name of the theorem. cond: {layer: condition number of Θ}, empty if nothing is inverted. parameters:
    (before, after). random, real: {dtype: dict} of `compare_logits` on random and on validation tokens; real is None
    if the validation bins are not available. Their float64 has a bound, too: of rounding in an exact rewriting.
    Raises ValueError, with nothing written, if the files or the model do not allow it, or if the logits of the two
    models differ by more than the bound.
    """
    source, target = Path(cfg.ckpt), Path(cfg.out)
    if target.exists():
        raise ValueError(f"{target} already exists: choose another --out=…, or delete it")
    state = checkpoint.load(source)
    elsewhere = target.parent.resolve() != source.parent.resolve()
    if elsewhere and run_files.holds_run(target.parent):
        raise ValueError(f"{target.parent} already contains another run: choose another --out=…, or {source.parent}")
    model = weights.in_older_options(checkpoint.build_model(state).eval())
    original = copy.deepcopy(model).double()
    print(f"rewriting {source}, step {state['step']}")
    ways = {"approximate": rewrite_approximately, "heads": rewrite_heads, "triangular": rewrite_triangular}
    rewrite = next((function for name, function in ways.items() if getattr(cfg, name)), rewrite_exactly)
    result, conditions, rewritten = rewrite(original, state, cfg)
    reduced = copy.deepcopy(rewritten).float()

    before, after = model.num_params().total, reduced.num_params().total
    print(f"parameters: {before:,} → {after:,} ({after - before:+,})")
    if state["model_config"]["tie_weights"] and not reduced.config.tie_weights:
        print("the embedding and the LM head were tied and are now two matrices (Remark 2)")
    models = {torch.float64: (original, rewritten)} | dict.fromkeys([torch.float32, torch.bfloat16], (model, reduced))

    def compare(tokens, x, y, with_loss):
        rows = compare_logits(models, x, y)
        if not cfg.approximate:
            rows["float64"]["bound"] = verification.rounding_bound(original, x[:N_RANDOM], conditions.values())
        print_comparison(tokens, rows, with_loss)
        if not cfg.approximate:
            check_exact(result, cfg.which, tokens, rows["float64"])
        return rows

    shape = (N_RANDOM, model.config.block_size)
    random_tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found = {"result": result, "cond": conditions, "parameters": (before, after)}
    tokens = f"{N_RANDOM} sequences of random tokens"
    found["random"] = compare(tokens, random_tokens, random_tokens, with_loss=False)
    try:
        x, y = trained_model.recorded_windows(state, "val", cfg.windows, cfg.data_dir, cfg.dataset)
    except ValueError as error:
        print(f"not compared on validation text: {error}")
        found["real"] = None
    else:
        found["real"] = compare(f"{len(x)} validation windows", x, y, with_loss=True)

    asked = {name: getattr(cfg, name) for name in ("ckpt", "which", "layer", "gauge", "rows", "max_cond", *ways)}
    write(target, source, state, reduced, {**asked, **found})
    print(f"wrote {target}")
    print(f"to generate text: python sample.py --out_dir={target.parent} --ckpt={target.name}")
    options = [*changed_options(model.config, reduced.config), f"--init_from={target}"]
    print(f"to train it further, add to the options of the run: {' '.join(options)}")
    return found


def rewrite_exactly(original, state, cfg):
    """Rewrite a GPT with the same logits, as cfg says: (the result's name, {layer: condition number of Θ}, new GPT)."""
    result = reparametrize.covering_result(original, cfg.which, cfg.layer)
    inverts = result in reparametrize.BY_CHANGE_OF_BASIS
    start = original if cfg.gauge == "kept" else gauge.change_gauge(original, cfg.gauge, cfg.which)
    conditions = reparametrize.condition_numbers(start, cfg.which, cfg.layer) if inverts else {}
    matrix = f"W_{cfg.which.upper()}"
    print(f"{matrix} = I by {result}{'' if inverts else ', which inverts no matrix'}")
    for layer, condition in conditions.items():
        print(f"layer {layer}: {matrix} has condition number {condition:.4g}")
    return result, conditions, reparametrize.eliminate(start, cfg.which, cfg.layer, cfg.max_cond)


def rewrite_heads(original, state, cfg):
    """As `rewrite_exactly`, with d_k rows of each head of W_Q and W_V as I: {'layer 0, W_Q': condition}."""
    rewritten, found = gauge.identity_in_heads(original, cfg.rows)
    conditions = {f"layer {layer}, W_{name.upper()}": condition for (layer, name), condition in found.items()}
    config, names = original.config, " and ".join(sorted({f"W_{name.upper()}" for _, name in found}))
    advice = "choose better rows with --rows=chosen, or " if cfg.rows == "top" else ""
    for matrix, condition in conditions.items():
        print(f"{matrix}: the rows that become I have condition numbers of up to {condition:.4g}")
        if condition > cfg.max_cond:
            raise ValueError(
                f"{matrix}: the {cfg.rows} {config.d_k} rows are badly conditioned ({condition:.3g}, max_cond="
                f"{cfg.max_cond:g}), so inverting them would make the logits imprecise: {advice}accept that with a "
                "larger max_cond"
            )
    print(
        f"the {cfg.rows} {config.d_k} rows of each head of {names} are I: "
        f"{len(found) * config.kv_heads * config.d_k**2:,} parameters are known and need not be stored (the file has "
        "them, so that every program loads it)"
    )
    if cfg.rows == "top":
        print("--rows=chosen saves as many and keeps the other entries small, as large models in bfloat16 need")
    return "Proposition 4.2 and its twin for W_V and W_O", conditions, rewritten


def rewrite_triangular(original, state, cfg):
    """As `rewrite_exactly`, with an upper triangular W_Q in cfg.layer."""
    rewritten = orthogonal.triangular_query(original, cfg.layer)
    d = original.config.n_embd
    print(f"W_Q of layer {cfg.layer} is upper triangular: {d * (d - 1) // 2:,} of its {d * d:,} parameters are 0")
    return "an orthogonal change of basis", {}, rewritten


def rewrite_approximately(original, state, cfg):
    """As `rewrite_exactly`, but approximately: W_Q = I, and W_K fitted on the checkpoint's training text."""
    x, _ = trained_model.recorded_windows(state, "train", cfg.windows, cfg.data_dir, cfg.dataset)
    print(f"W_Q = I and a W_K fitted on {len(x)} training windows: not exact, for fine-tuning")
    fitted = trained_model.fit_keys(copy.deepcopy(original).float(), x)
    return "a fitted W_K", {}, trained_model.without_queries(fitted).double()


@torch.no_grad()
def compare_logits(models, x, y):
    """How far the logits of two models are apart on x, (n, T) int64, and their losses on the targets y, (n, T).

    models: {dtype: (original, rewritten)}; those of bfloat16 compute under autocast, as train.py and sample.py do.
    Returns {dtype: dict}. difference: the largest over all logits. relative: that divided by the largest logit.
    rounding, also relative: how far the original's logits in this dtype are from those in float64. loss_before and
    loss_after: in nats per target.
    """
    zero = torch.zeros((), dtype=torch.float64)
    rows = {dtype: dict.fromkeys(("difference", "largest", "rounding", "before", "after"), zero) for dtype in models}
    vocab_size = models[torch.float64][0].config.vocab_size
    batch_size = max(1, verification.N_LOGITS // (x.size(1) * vocab_size))
    for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
        reference, _ = models[torch.float64][0](inputs, targets)
        for dtype, pair in models.items():
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                (old, old_loss), (new, new_loss) = (model(inputs, targets, reduction="none") for model in pair)
            row, old = rows[dtype], old.double()
            row["difference"] = torch.maximum(row["difference"], (new.double() - old).abs().max())
            row["rounding"] = torch.maximum(row["rounding"], (old - reference).abs().max())
            row["largest"] = torch.maximum(row["largest"], old.abs().max())
            row["before"] = row["before"] + old_loss.double().sum()
            row["after"] = row["after"] + new_loss.double().sum()
    found, n_targets = {}, (y >= 0).sum().item()
    for dtype, row in rows.items():
        difference, largest, rounding, before, after = (row[name].item() for name in row)
        found[devices.dtype_name(dtype)] = {
            "difference": difference,
            "relative": difference / largest if largest else difference,
            "rounding": rounding / largest if largest else rounding,
            "loss_before": before / n_targets,
            "loss_after": after / n_targets,
        }
    return found


def check_exact(result, which, tokens, row):
    """Raise ValueError unless rounding can explain how far the logits of two models are apart.

    result: the name of the theorem. tokens: on which they were compared. row: of float64, with relative and bound.
    """
    if not row["relative"] <= row["bound"]:
        approximately = ", or rewrite it with --approximate and fine-tune" if which == "q" else ""
        raise ValueError(
            f"the logits of the two models must agree up to rounding, {row['bound']:.1e} in float64 relative to the "
            f"largest, got {row['relative']:.1e} on {tokens}, so the rewriting by {result} is not exact for this model "
            f"and nothing is written: undo the changes that were made to the code of the model{approximately}"
        )


def print_comparison(tokens, rows, with_loss):
    """Print the result of `compare_logits` on the tokens that `tokens` names, one line per dtype."""
    print(f"largest difference between the logits on {tokens} (relative: divided by the largest logit):")
    for dtype, row in rows.items():
        line = f"  {dtype:<8}  {row['difference']:.2e}, relative {row['relative']:.2e}"
        if "bound" in row:
            line += f" (rounding: up to {row['bound']:.2e})"
        elif dtype != "float64":
            line += f" (rounding in the original: {row['rounding']:.2e})"
        if with_loss:
            change = row["loss_after"] - row["loss_before"]
            line += f"; loss {row['loss_before']:.6f} → {row['loss_after']:.6f} ({change:+.1e})"
        print(line)


def changed_options(old, new):
    """The options of train.py, as texts, that turn the GPTConfig old into new."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [f"--{name}={value}" for name, value in after.items() if value != before[name]]


def write(target, source, state, model, eliminated):
    """Write model as a checkpoint to target, and a copy of source's run.json if target's folder has none."""
    model_config = dataclasses.asdict(model.config)
    kept = {name: state[name] for name in ("step", "best_val_loss", "data_fingerprint") if name in state}
    if "config" in state:
        kept["config"] = {**state["config"], **model_config}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {target.parent} ({error.strerror}): choose another --out=…"
        ) from error
    checkpoint.save(target, model=model.state_dict(), model_config=model_config, eliminated=eliminated, **kept)
    run, run_file = read_json(source.parent / run_files.FACTS), target.parent / run_files.FACTS
    if run is None:
        print(f"{source.parent} has no run.json, which names the tokenizer: sample.py needs --tokenizer=… for {target}")
    elif not run_file.exists():
        try:
            write_json(run_file, {**run, "parameters": model.num_params()._asdict(), "eliminated": eliminated})
        except ValueError:
            target.unlink()  # else it would be in the way of the same command
            raise


def main(argv):
    """The command; see the module's docstring."""
    eliminate(configurator.parse(EliminateConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
