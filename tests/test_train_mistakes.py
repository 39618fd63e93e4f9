"""What a user of train.py may get wrong, in one line each, and the runs that it must leave alone."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_dataset
from trained import ROOT, arguments, metrics, stop_after

import train
from engine import checkpoint, devices


@pytest.fixture
def finished(tiny):
    """Options of a finished run in the folder run."""
    options = {**TINY, "out_dir": "run", "max_iters": 4, "eval_interval": 2}
    train.train(tiny(**options))
    return options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["run already contains a run", "--resume", "--out_dir"]),
        (dict(resume=True, n_embd=32), ["ckpt.pt", "n_embd is 16 in the checkpoint and 32 here", "--out_dir"]),
        (dict(resume=True, attn_scale=0.5), ["attn_scale is 1.0 in the checkpoint and 0.5 here"]),
        (dict(resume=True, data_seed=3), ["data_seed is 1337 in the checkpoint and 3 here"]),
        (dict(resume=True, max_iters=3, warmup_iters=0), ["4 steps already", "max_iters=3"]),
        (dict(out_dir="new", init_from="run/ckpt.pt", n_layer=3), ["n_layer is 2 in the checkpoint and 3 here"]),
        (dict(out_dir="new", init_from="nowhere.pt"), ["nowhere.pt"]),
        (dict(out_dir="new", eval_only=True), ["new/ckpt.pt"]),
    ],
)
def test_a_run_is_not_overwritten_or_mixed_with_another(finished, refuses, changes, words):
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    refuses(train.main, *arguments(**{**finished, **changes}), words=words)
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(vocab_size=49), ["vocab_size=50 or more", "vocab_size=49"]),
        (
            dict(tokens_per_step=200),
            ["tokens_per_step=200 is not divisible by batch_size × block_size = 128 (nearest: 128, 256)"],
        ),
        (dict(tokens_per_step=100), ["tokens_per_step=100", "128"]),
        (dict(block_size=600, tokens_per_step=4800), ["validation split", "block_size=600"]),
        (dict(block_size=5000, tokens_per_step=40000), ["training split", "block_size=5000"]),
        (dict(n_head=3), ["n_embd=16", "n_head=3"]),
        (dict(learning_rate=0), ["learning_rate must be positive"]),
        (dict(seed=-1), ["seed must be zero or positive"]),
        (dict(beta2=1), ["beta1 and beta2 must be below 1"]),
        (dict(device="gpu"), ["device must be auto, cpu, cuda, cuda:1, … or mps, got 'gpu'"]),
        (dict(device="meta"), ["device must be auto", "got 'meta'"]),
        (dict(device="mps"), ["device=mps", "--device=cpu"]),
        (dict(n_embd=2**20), ["n_embd=1048576", "GB for weights, gradients and AdamW", "make the model smaller"]),
        (dict(device="cuda:7"), ["device=cuda:7"]),
        (dict(dtype="float8"), ["dtype must be one of"]),
        (dict(min_lr=1), ["min_lr must be at most learning_rate=0.01, got 1"]),
        (dict(warmup_iters=50), ["warmup_iters must be at most max_iters=40, got 50"]),
        (dict(dataset="other"), ["data/other/train.bin", "the datasets in data are tiny"]),
        (dict(dataset="stdlib"), ["data/stdlib/train.bin", "`python prepare_owt.py --source=stdlib`"]),
        (dict(weigth_decay=0.1), ["weigth_decay", "did you mean weight_decay?"]),
        (dict(out_dir="data/tiny/train.bin"), ["data/tiny/train.bin"]),
    ],
)
def test_mistakes_end_in_one_line(tiny, refuses, changes, words):
    tiny()
    refuses(train.main, *arguments(**{**TINY, "out_dir": "run", **changes}), words=words)
    assert not Path("run").exists()


def test_a_zero_is_a_valid_number(tiny):
    assert train.train(tiny(weight_decay=0.0, max_iters=0, grad_clip=0.0))["steps"] == 0


def test_a_machine_without_data_is_told_the_two_ways_to_begin(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "config/reduced_tied.py"
    two_ways = ["`python prepare_owt.py`", "`python prepare_owt.py --source=stdlib && python train.py config/quick.py"]
    refuses(train.main, config, words=["data/openwebtext/train.bin", *two_ways])
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_cannot_be_resumed(finished, refuses):
    state = checkpoint.load("run/ckpt.pt")
    del state["optimizer"]
    checkpoint.save("run/ckpt.pt", **{name: value for name, value in state.items() if name != "format"})
    refuses(train.main, "--out_dir=run", "--resume", words=["run/ckpt.pt", "--init_from=run/ckpt.pt"])


def test_data_that_changed_is_told_on_resume(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train.train(tiny())
    shutil.rmtree("data/tiny")
    write_dataset(tmp_path / "data/tiny", seed=9)
    train.train(tiny(resume=True))
    assert "warning: the data" in capsys.readouterr().out


def test_another_precision_on_resume_is_told(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train.train(tiny(dtype="auto"))
    monkeypatch.setattr(devices, "choose_dtype", lambda *_: torch.bfloat16)  # as another machine would
    train.train(tiny(dtype="auto", resume=True))
    assert "the run was in float32 and goes on in bfloat16; --dtype=float32" in capsys.readouterr().out
    assert [s["dtype"] for s in json.loads(Path("run/run.json").read_text())["segments"]] == ["float32", "bfloat16"]


def test_resuming_where_nothing_is_begins_a_run(tiny, command):
    tiny()
    status, out, _ = command(
        train.main, *arguments(**{**TINY, "max_iters": 2, "warmup_iters": 0, "out_dir": "new"}), "--resume"
    )
    assert status == 0
    assert "begins at step 0" in out
    assert Path("new/summary.json").exists()


def test_the_folder_is_named_by_the_config_files(tiny, tmp_path, command):
    tiny()
    Path("wide.py").write_text("n_embd = 32")
    Path("tiny.py").write_text(
        "\n".join(f"{name} = {value!r}" for name, value in {**TINY, "max_iters": 1, "warmup_iters": 0}.items())
    )
    assert command(train.main, "tiny.py", "wide.py", "--seed=3")[0] == 0
    assert json.loads(Path("out/tiny-wide/config.json").read_text())["n_embd"] == 32
    # Neither the files nor the options need be repeated to go on with it.
    assert command(train.main, "--out_dir=out/tiny-wide", "--resume", "--max_iters=2")[0] == 0
    stored = json.loads(Path("out/tiny-wide/config.json").read_text())
    assert (stored["n_embd"], stored["seed"], stored["max_iters"]) == (32, 3, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_stops_a_real_process_at_a_step(tiny, tmp_path, number):
    tiny()
    options = arguments(**{**TINY, "max_iters": 10**6, "out_dir": "run", "log_interval": 10, "eval_interval": 10**6})
    with subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 20/"):
                process.send_signal(number)
                break
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--out_dir=run --resume" in rest
    step = checkpoint.load("run/ckpt.pt")["step"]
    assert step >= 20
    assert metrics("run")[-1]["step"] <= step
