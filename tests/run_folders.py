"""Studies, planned or with finished run folders, without training: for tests of what reads them."""

import dataclasses
import itertools
import json
from pathlib import Path

from conftest import TINY

import configurator
import sweep
from engine.flops import cost
from studies.plan import planned_runs
from train_config import TrainConfig

STEPS = (0, 20, 40)
REDUCED = dict(wq_identity=True, attn_scale=0.5, weight_decay=2**-5)
TWO_ARMS = """
arms = {"baseline": "", "reduced": "--wq_identity --attn_scale=0.5"}
control = "baseline"
"""


def write_study_files(text=TWO_ARMS, **size):
    """A study's file of the given text and one that sets the tiny size, in the working folder; the names of both."""
    Path("my_study.py").write_text(text)
    Path("tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in {**TINY, **size}.items()))
    return ["my_study.py", "tiny.py"]


def planned(*argv, options=()):
    """(runs, content of study.json) of a study as sweep.py plans it. options: arguments of train.py."""
    return planned_runs(configurator.parse(sweep.SweepConfig, list(argv), positional="files"), list(options))


def records(folder, kind):
    """The records of one kind in a run folder's metrics.jsonl."""
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def write_run(folder, seed, loss, finished=True, fingerprint="abc", diagnostics=False, **fields):
    """Write a run folder whose final validation loss is `loss`; without summary.json unless finished."""
    cfg = TrainConfig(**{**TINY, "seed": seed, "out_dir": str(folder), "max_iters": STEPS[-1], **fields})
    expected = cost(cfg.model_config())
    tokens = cfg.max_iters * cfg.tokens_per_step
    records = []
    for step in STEPS:
        curve = loss + 2 - 2 * step / STEPS[-1]
        if step:
            records.append({"step": step, "kind": "train", "loss": curve - 0.1, "tokens_per_second": 1e4})
        records.append({"step": step, "kind": "eval", "val_loss": curve, "val_loss_se": 0.01, "windows": 7})
        if diagnostics:
            layers = [seed + step + layer for layer in range(cfg.n_layer)]
            norms = [None] * cfg.n_layer if cfg.wq_identity else layers
            gradients = layers if step else None
            found = {"attn_logit_max": layers, "W_Q_norm": norms, "grad_norm": gradients}
            records.append({"step": step, "kind": "diagnostics", **found})
    contents = {
        "config.json": dataclasses.asdict(cfg),
        "run.json": {
            "git_commit": "0123abc",
            "versions": {"torch": "2.13.0"},
            "parameters": {"total": expected.total, "attn_mlp": expected.attn_mlp},
            "data": {"fingerprint": fingerprint, "tokenizer": "bytes"},
            "device": "CPU, 1 threads",
            "dtype": "float32",
        },
    }
    if finished:
        contents["summary.json"] = {
            "val_loss": loss,
            "val_loss_se": 0.01,
            "best_val_loss_during_training": loss,
            "train_loss": loss - 0.1,
            "steps": cfg.max_iters,
            "tokens": tokens,
            "tokens_per_second": 1e4,
        }
    Path(folder).mkdir(parents=True)
    for name, content in contents.items():
        Path(folder, name).write_text(json.dumps(content))
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Path(folder)


def write_study(folder, arms, loss, grid=None, seeds=(1, 2, 3), control=None, missing=(), **options):
    """Write a study folder as sweep.py does; the final validation losses are loss(arm, seed, **point).

    arms: name -> fields of TrainConfig. control: arm -> its control; None: the first arm. missing: (arm, seed) pairs of
    runs that were not started. options: of write_run.
    """
    entries = []
    for values in itertools.product(*(grid or {}).values()):
        point = dict(zip(grid or {}, values, strict=True))
        for arm, fields in arms.items():
            name = ",".join([arm, *(f"{key}={value}" for key, value in point.items())])
            against = (control or {}).get(arm, arm) if control else next(iter(arms))
            entries.append({"name": name, "arm": arm, "control": against, "point": point, "arguments": []})
            for seed in seeds:
                if (arm, seed) not in missing:
                    run = Path(folder, name, f"seed{seed}")
                    write_run(run, seed, loss(arm, seed, **point), **{**fields, **point, **options})
    content = {"name": Path(folder).name, "command": "python sweep.py config/study.py", "seeds": seeds}
    content |= {"format": 1, "control": None, "grid": grid or {}, "arms": entries}
    Path(folder, "study.json").write_text(json.dumps(content))
    return Path(folder)
