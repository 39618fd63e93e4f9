"""max_seconds: a run and a study stop in time, with a checkpoint, and go on as if they had not."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY
from trained import ROOT, arguments, assert_equal_weights, metrics, weights

import train
from engine import checkpoint, signals
from engine.files import read_json


@pytest.mark.parametrize("stop_at", [20, 23])
def test_a_run_that_stops_in_time_and_goes_on_equals_one_that_ran_through(tiny, command, monkeypatch, stop_at):
    options = {**TINY, "dropout": 0.1}
    expected = train.train(tiny(out_dir="straight", **options))
    update, clock = train.Trainer.update, SimpleNamespace(now=0.0)

    def update_and_tick(self, *batch):
        done = update(self, *batch)
        clock.now = float(self.step)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
        patch.setattr(train.Trainer, "update", update_and_tick)
        status, out, _ = command(train.main, *arguments(**options, out_dir="parts", max_seconds=stop_at))
    assert status == 75
    assert f"stopped after {stop_at} seconds; continue with: python train.py --out_dir=parts --resume" in out
    assert checkpoint.load("parts/ckpt.pt")["step"] == stop_at
    assert command(train.main, "--out_dir=parts", "--resume")[0] == 0
    assert read_json("parts/config.json")["max_seconds"] is None, "the limit is that of one call"
    assert_equal_weights(weights("straight"), weights("parts"))
    assert metrics("straight") == metrics("parts")
    assert read_json("parts/summary.json")["val_loss"] == expected["val_loss"]
    assert [segment["changed"] for segment in read_json("parts/run.json")["segments"]] == [{}, {}]


def test_a_long_step_is_cut_short(tiny, command, monkeypatch):
    options = {**TINY, "batch_size": 2, "out_dir": "run"}
    sync, calls = train.distributed.sync_gradients, []
    clock = SimpleNamespace(monotonic=lambda: float(len(calls)))
    monkeypatch.setattr(signals, "time", clock)
    monkeypatch.setattr(train.distributed, "sync_gradients", lambda *of: (calls.append(of), sync(*of)))
    assert command(train.main, *arguments(**options, max_seconds=4 * 7 + 2))[0] == 75
    assert len(calls) == 4 * 7 + 2
    assert checkpoint.load("run/ckpt.pt")["step"] == 7


def test_a_run_that_ends_in_time_is_finished(tiny, command):
    tiny()
    assert command(train.main, *arguments(**TINY, out_dir="run", max_seconds=1000))[0] == 0
    assert Path("run/summary.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the time counts from the first line")
def test_the_time_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.5); from engine import signals; print(signals.process_start())"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert before - 0.02 <= float(done.stdout) < before + 0.4


def test_a_real_process_stops_in_time_with_its_imports(tiny):
    tiny()
    options = {**TINY, "max_iters": 10**7, "eval_interval": 10**7, "out_dir": "run", "max_seconds": 4}
    began = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments(**options)], capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 75, done.stderr
    assert "stopped after 4 seconds" in done.stdout
    assert 4 <= seconds
    assert checkpoint.load("run/ckpt.pt")["step"] >= 1
