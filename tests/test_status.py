"""The state of a study's runs as `sweep.py --watch` shows it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from conftest import TINY
from run_folders import TWO_ARMS, planned, records, write_run, write_study, write_study_files

import sweep
import train
from engine import locks
from engine.flops import cost
from studies import status, store
from train_config import TrainConfig


def test_the_view_shows_what_the_files_hold(tiny, command):
    argv = [*write_study_files(TWO_ARMS + "grid = {'beta1': [0.5, 0.9]}\nseeds = [1]"), "--out_dir=out"]
    runs, content = planned(*argv)
    store.write_study("out", content)
    for number, run in enumerate(runs[:3]):
        train.train(dataclasses.replace(run.config, max_iters=20 + 10 * (number == 1)))
    Path(runs[1].folder, "summary.json").unlink()
    Path(runs[2].folder, "summary.json").unlink()
    lock = locks.acquire(locks.lock_path(runs[2].folder))
    with open(runs[2].folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "ki')  # as while a line is being written
    shown = {row["run"]: row for row in status.rows("out", store.read_study("out"))}
    losses = [{r["step"]: r["val_loss"] for r in records(run.folder, "eval")} for run in runs[:2]]
    first, second, third, last = (shown[run.label] for run in runs)
    assert [row["state"] for row in (first, second, third, last)] == ["finished", "stopped", "running", "not started"]
    assert [row["step"] for row in (first, second, third, last)] == [20, 30, 20, None]
    assert (first["val_loss"], first["difference"]) == (losses[0][20], None)
    assert (second["val_loss"], second["difference"]) == (losses[1][30], None), "the control has no step 30"
    assert first["tokens_per_second"] == records(runs[0].folder, "train")[-1]["tokens_per_second"]
    with open(runs[0].folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "kind": "eval", "val_loss": losses[1][30] - 0.25}) + "\n")
    assert status.rows("out", store.read_study("out"))[1]["difference"] == pytest.approx(0.25)
    code, out, _ = command(sweep.main, *argv, "--watch=1")
    assert code == 0
    lines = out.splitlines()[-6:]
    assert lines[0] == "out: 1 running, 1 stopped, 1 finished, 1 not started"
    assert lines[3].split()[1:5] == ["stopped", "30", f"{losses[1][30]:.4f}", "+0.2500"]
    os.close(lock)


def test_the_view_fits_its_terminal_and_shows_running_runs_first():
    rows = [dict(run=f"arm/seed{n}", state="not started", **dict.fromkeys(list(status.COLUMNS)[2:])) for n in range(50)]
    rows[40]["state"], rows[45]["state"] = "failed", "running"
    lines = status.view("study", rows, width=30, height=12).splitlines()
    assert len(lines) < 12 and max(map(len, lines)) <= 30
    lines = status.view("study", rows, width=100, height=12).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["arm/seed45", "running"], ["arm/seed40", "failed"]]
    assert int(lines[-1].split()[2]) == 50 - (len(lines) - 3)
    assert len(status.view("study", rows).splitlines()) == 52
    rows[0]["run"] = "an,arm=with,a=very,long=name/seed17"
    lines = status.view("study", rows[:2], width=70).splitlines()
    assert {len(line) for line in lines[1:]} == {70}
    assert lines[2].startswith("an,arm=") and "…" in lines[2] and "/seed17  not started" in lines[2]


def test_a_study_that_has_not_begun_is_waited_for(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "later"
    status.watch(folder, 1)
    assert capsys.readouterr().out == f"{folder}: not begun\n"
    naps = []

    def begin(seconds):  # in place of the second nap
        naps.append(seconds)
        if len(naps) == 2:
            write_study(folder, {"a": {}}, lambda arm, seed: 2.0, seeds=(1,))

    monkeypatch.setattr(status.time, "sleep", begin)
    monkeypatch.setattr(status.sys.stdout, "isatty", lambda: True, raising=False)
    status.watch(folder, 7)
    assert naps == [7, 7]
    assert "later: 1 finished" in capsys.readouterr().out


def test_how_long_runs_take_follows_from_the_run_that_was_measured_last(tmp_path, monkeypatch, tiny):
    files = write_study_files(TWO_ARMS + "seeds = [1, 2]", max_iters=4000)
    runs, _ = planned(*files, "--out_dir=out/study")
    assert status.duration(runs, dict.fromkeys(runs, 1), 2, Path("out")) == (
        "how long is not known, since no run in out has a measured speed yet"
    )
    write_run("out/a/old", 1, 2.0)  # 10,000 tokens/s
    write_run("out/new", 1, 2.0, n_embd=32)
    os.utime("out/a/old/metrics.jsonl", (1, 1))
    tokens = 40 * TINY["tokens_per_step"]
    wide, tiny_, reduced = (
        cost(configuration.model_config()).training_flops
        for configuration in (TrainConfig(**TINY | {"n_embd": 32}), runs[0].config, runs[1].config)
    )
    assert runs[1].flops == 100 * tokens * reduced
    folder, rate, speed = status.last_speed(runs, "out")
    assert (folder, rate, speed) == (Path("out/new"), pytest.approx(1e4 * wide), 1e4)
    summary = json.loads(Path("out/new/summary.json").read_text())
    Path("out/new/summary.json").write_text(json.dumps(summary | {"wall_seconds": 2.0, "train_seconds": 0.5}))
    assert status.last_speed(runs, "out")[2] == tokens / 2
    write_run(runs[0].folder, 1, 2.0, finished=False)  # of the study itself, 40 of 4,000 steps
    os.utime(runs[0].folder / "metrics.jsonl", (1, 1))
    assert status.last_speed(runs, "out") == (runs[0].folder, pytest.approx(1e4 * tiny_), 1e4)
    seconds = (sum(run.flops for run in runs) - 0.01 * runs[0].flops) / (1e4 * tiny_) / 2
    assert 50 < seconds < 100
    assert status.duration(runs, dict.fromkeys(runs, 1), 2, "out").startswith(f"about {seconds:.0f} s, 2 at a time")


def test_spans_are_in_words():
    seconds = (40, 720, 12_000, 200_000)
    assert [status.span(each) for each in seconds] == ["40 s", "12 min", "3 h 20 min", "2 d 7 h"]
