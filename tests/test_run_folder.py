"""What happens to a run folder: changed options, kills between two files, damage, two writers, broken mirrors."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import TINY
from trained import ROOT, arguments, metrics, stop_after

import train
from engine import checkpoint, resuming
from engine.files import read_json


def test_a_resumed_run_takes_over_every_changed_option_of_the_optimizer(tiny):
    train.train(tiny(max_iters=20))
    changes = dict(weight_decay=0.5, weight_decay_mlp=0.25, beta1=0.8, beta2=0.99, learning_rate=5e-3, max_iters=30)
    train.train(tiny(resume=True, **changes))
    state = checkpoint.load("run/ckpt.pt")
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.25, 0.5, 0.0]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.99)}
    segments = read_json("run/run.json")["segments"]
    assert segments[0]["changed"] == {}
    assert segments[1]["step"] == 20
    assert segments[1]["changed"] == {
        name: [getattr(tiny(max_iters=20), name), value] for name, value in changes.items()
    }


def test_what_a_kill_left_undone_is_made_good_on_resume(tiny, monkeypatch):
    # Killed between ckpt.pt and the names that should stand for it.
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "make_links", lambda run: None)
        stop_after(patch, 20)
        train.train(tiny(save_steps=(20,), eval_interval=20))
    assert not Path("run/step_000020.pt").exists()
    Path("run/.ckpt.pt.99999.tmp").touch()
    train.train(tiny(save_steps=(20,), eval_interval=100, resume=True))
    assert checkpoint.load("run/step_000020.pt")["step"] == 20
    assert not Path("run/.ckpt.pt.99999.tmp").exists()


def test_a_checkpoint_that_resume_writes_again_is_the_same(tiny, monkeypatch):
    """Killed between the last checkpoint and summary.json."""
    with monkeypatch.context() as patch:
        patch.setattr(train.runlog, "summary", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(tiny(max_iters=20))
    before = checkpoint.load("run/ckpt.pt")["optimizer"]["param_groups"]
    train.train(tiny(max_iters=20, resume=True))
    assert checkpoint.load("run/ckpt.pt")["optimizer"]["param_groups"] == before
    assert before[0]["lr"] < tiny().learning_rate


@pytest.mark.parametrize("when", ["start", "first step"])
def test_a_start_that_fails_leaves_no_run(tiny, monkeypatch, when):
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(*((train.runlog, "header") if when == "start" else (train.Trainer, "update")), fail)
    with pytest.raises(ValueError, match="no"):
        train.train(tiny(out_dir="out/run"))
    assert not Path("out").exists()


def test_a_signal_between_micro_batches_ends_the_step_which_resume_repeats(tiny, monkeypatch):
    options = dict(batch_size=2, dropout=0.1, log_interval=5, max_iters=20)
    expected = train.train(tiny(out_dir="straight", **options))
    sync, calls = train.distributed.sync_gradients, []

    def signal_in_the_middle(*arguments):
        calls.append(arguments)
        if len(calls) == 4 * 12 + 3:  # the third of four micro-batches of the thirteenth step
            os.kill(os.getpid(), signal.SIGTERM)
        sync(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.distributed, "sync_gradients", signal_in_the_middle)
        assert train.train(tiny(**options)) is None
    assert len(calls) == 4 * 12 + 3
    assert checkpoint.load("run/ckpt.pt")["step"] == 12
    assert train.train(tiny(resume=True, **options))["val_loss"] == expected["val_loss"]
    assert metrics("run") == metrics("straight")


def test_a_long_step_shows_its_micro_batches(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train.BetweenMicroBatches, "SECONDS", 0)
    train.train(tiny(batch_size=2, max_iters=2))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("micro-batch")]
    assert shown == ["micro-batch 1 of 4", "micro-batch 2 of 4", "micro-batch 3 of 4"] * 2


def test_damaged_lines_of_the_metrics_are_set_aside(tiny, capsys):
    train.train(tiny(max_iters=20))
    path = Path("run/metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [lines[3][:20] + b"\n", b"\0\0\0\n", b'{"step": "x"}\n', b"[]\n"]
    path.write_bytes(b"".join([*lines[:3], *damaged, *lines[4:], b'{"step": 21, "ki']))
    train.train(tiny(max_iters=30, resume=True))
    steps = [record["step"] for record in metrics("run") if record["kind"] == "train"]
    assert steps == [step for step in range(1, 31) if step != json.loads(lines[3])["step"]]
    assert Path("run/metrics.damaged").read_bytes() == b"".join(damaged)
    assert "metrics.damaged now: 4" in capsys.readouterr().out


def test_a_lost_metrics_line_stops_the_run_and_resume_goes_on(tiny, monkeypatch):
    expected = train.train(tiny(out_dir="expected"))
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="No space left on device"):
            train.train(tiny())
    assert train.train(tiny(resume=True))["val_loss"] == expected["val_loss"]


def test_init_from_takes_the_model_of_the_checkpoint_and_says_what_differs(tiny, command, refuses):
    train.train(tiny(max_iters=10, attn_scale=0.5))
    argv = arguments(**{**{k: v for k, v in TINY.items() if k not in ("n_layer", "n_head")}, "max_iters": 10})
    code, out, _ = command(train.main, *argv, "--out_dir=new", "--init_from=run/ckpt.pt")
    config = read_json("new/config.json")
    assert code == 0 and (config["n_head"], config["attn_scale"]) == (2, 0.5)
    assert "in the checkpoint" not in out
    code, out, _ = command(train.main, *argv, "--out_dir=other", "--init_from=run/ckpt.pt", "--n_head=4")
    assert code == 0 and "run/ckpt.pt: n_head is 2 in the checkpoint and 4 here" in out
    words = ["run/ckpt.pt can only be evaluated as it is", "n_head is 2 in the checkpoint and 4 here"]
    refuses(train.main, *argv, "--init_from=run/ckpt.pt", "--eval_only", "--n_head=4", words=words)


def test_a_run_that_began_from_other_weights_is_evaluated_with_its_own(tiny, command):
    train.train(tiny(max_iters=10))
    summary = train.train(tiny(max_iters=10, out_dir="new", init_from="run/ckpt.pt"))
    Path("run/ckpt.pt").unlink()
    code, out, _ = command(train.main, "--out_dir=new", "--eval_only")
    assert code == 0 and f"val_loss: {summary['val_loss']}" in out


class BrokenWandb(types.ModuleType):
    """A W&B of which one call fails."""

    def __init__(self, broken):
        super().__init__("wandb")
        self.broken = broken
        self.summary = self.plot = self

    def init(self, **_):
        self.fail("init")
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.fail("table" if "evaluations" in values else "log")

    def Table(self, **_):  # noqa: N802
        return self

    def Artifact(self, *_, **__):  # noqa: N802
        return self

    def line(self, *_, **__):
        return self

    def add_file(self, path):
        assert Path(path).exists()

    def log_artifact(self, artifact):
        self.fail("log_artifact")

    def update(self, *_):
        self.fail("update")

    def finish(self):
        self.fail("finish")

    def fail(self, call):
        if call == self.broken:
            raise RuntimeError(f"{call} is broken")


@pytest.mark.parametrize("broken", ["init", "log", "update", "table", "log_artifact", "finish"])
def test_a_mirror_that_breaks_is_one_warning(tiny, monkeypatch, capsys, broken):
    monkeypatch.setitem(sys.modules, "wandb", BrokenWandb(broken))
    train.train(tiny(max_iters=5, wandb_log=True, wandb_artifacts=True))
    assert capsys.readouterr().out.count(f"({broken} is broken): the run goes on without it") == 1
    assert read_json("run/summary.json")["steps"] == 5


def test_two_starts_at_once_make_one_run(tiny):
    Path("tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in TINY.items()))
    command = [sys.executable, ROOT / "train.py", "tiny.py", "--out_dir=out/run", "--max_iters=200"]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(start.communicate(timeout=120)[1], start.returncode) for start in starts]
    assert sorted(code for _, code in ends) == [0, 2]
    for error, code in ends:
        assert code == 0 or "is being written by another process" in error or "already contains a run" in error
    assert [record["step"] for record in metrics("out/run") if record["kind"] == "train"] == list(range(1, 201))
