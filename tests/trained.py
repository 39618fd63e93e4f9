"""What tests read from trained run folders, and how they stop a run."""

import json
import os
import signal
from pathlib import Path

import torch

import train
from engine import checkpoint

ROOT = Path(train.__file__).parent
TIMES = ("tokens_per_second",)


def metrics(folder):
    """The records of a run, without what depends on the machine's speed."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def weights(folder, name="ckpt.pt"):
    return checkpoint.load(Path(folder) / name)["model"]


def assert_equal_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tolerance:
            torch.testing.assert_close(tensor, other[name], **tolerance)
        else:
            assert torch.equal(tensor, other[name]), name


def stop_after(monkeypatch, step):
    """Send this process SIGTERM while it trains the step with this number."""
    update = train.Trainer.update

    def update_and_signal(self, *batch):
        done = update(self, *batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(train.Trainer, "update", update_and_signal)


def arguments(**options):
    return [f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.items()]
