"""Memory over many steps, and a dataset larger than the memory."""

import json
import os
from pathlib import Path

import numpy as np
from conftest import write_dataset

import data
import train

from . import children, training

GROWTH = 20e6  # bytes, at most
WARM = 1000  # steps, after which memory must not grow
LARGE = 40 * 10**9  # bytes


def resident():
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(folder, steps, rng):
    """Train the tiny model for many steps: resident memory after step WARM must not grow by more than GROWTH."""
    trial = folder / "trial"
    write_dataset(trial / "data/tiny")
    sizes = {}

    def prepare():
        check = train.Trainer.check

        def measured(trainer):
            sizes[trainer.step] = resident()
            (trial / "sizes.json").write_text(json.dumps(sizes))
            return check(trainer)

        train.Trainer.check = measured

    changes = dict(max_iters=steps, log_interval=WARM // 2, eval_interval=WARM, save_steps=())
    done = children.run(train.main, training.arguments(**changes), trial, prepare)
    found = {int(step): size for step, size in json.loads((trial / "sizes.json").read_text()).items()}
    growth = max(found.values()) - found[WARM]
    wrong = "" if done.status == 0 and growth < GROWTH else f"{growth / 1e6:.1f} MB more ({done.describe()})"
    yield f"{steps} steps", wrong, f"{growth / 1e6:.1f} MB more resident memory than after {WARM:,} steps"


def large_data(folder, n_bytes, rng):
    """Train on a sparse train.bin of n_bytes, with a manifest: every token is the first."""
    trial = folder / "trial"
    write_dataset(trial / "data/tiny")
    path = trial / "data/tiny/train.bin"
    os.truncate(path, n_bytes)
    manifest = json.loads((path.parent / "meta.json").read_text())
    manifest["splits"]["train"]["tokens"] = n_bytes // 2
    data.write_manifest(path.parent, **{name: value for name, value in manifest.items() if name != "format"})
    done = children.run(train.main, training.arguments(max_iters=5, warmup_iters=0), trial)
    records = [json.loads(line) for line in (trial / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    right = done.status == 0 and len(losses) == 5 and np.isfinite(losses).all()
    offsets = data.batch_offsets(n_bytes // 2, 16, 1000, data_seed=0, step=0)
    wrong = "" if right and offsets.max() > 0.9 * n_bytes / 2 else f"{done.describe()}"
    yield f"{n_bytes:,} bytes", wrong, "nothing"
