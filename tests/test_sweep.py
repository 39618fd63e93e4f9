"""Carrying out a study: locks, failures, signals, GPUs, repeated commands (its file and plan: test_study_file.py)."""

import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import TINY
from run_folders import TWO_ARMS, planned, records, write_study, write_study_files

import configurator
import report
import sweep
import train
from engine import devices, locks, run_files
from engine.flops import cost
from studies import store, workers
from train_config import NO_PART_OF_RESULT, TrainConfig

# To a sweep it looks like train.py, but takes milliseconds: it waits while the file `wait` exists, fails at n_layer=3
# and diverges at n_layer=5; neither where the file `mended` exists.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(argument[2:].partition("=")[::2] for argument in sys.argv[1:] if argument.startswith("--"))
folder = Path(options["out_dir"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
with open("starts.txt", "a") as file:
    file.write(f"{folder}\\n")
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
if options.get("n_layer") == "3" and not os.path.exists("mended"):
    sys.exit("error: three layers are too many")
if options.get("n_layer") == "5" and not os.path.exists("mended"):
    (folder / "nonfinite.json").write_text(json.dumps({"step": 17, "loss": "nan", "grad_norm": "nan"}))
    sys.exit("FloatingPointError: step 17")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "kind": "train", "tokens_per_second": 1}) + "\\n")
while os.path.exists("wait"):
    time.sleep(0.02)
(folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def files(tiny):
    return write_study_files


@pytest.fixture
def fake(monkeypatch):
    """Let sweeps start a stand-in for train.py; a function that returns the run folders it was started for."""
    Path("fake.py").write_text(FAKE)
    monkeypatch.setattr("studies.plan.TRAIN", Path("fake.py"))
    return lambda: Path("starts.txt").read_text().split() if Path("starts.txt").exists() else []


def in_background(*argv):
    """Start a sweep in a process, and a group, of its own; its exitcode is that of the command."""

    def run():
        os.setpgrp()
        configurator.run(sweep.main, list(argv))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def folders(out, names=("baseline", "reduced"), seeds=(1, 2, 3)):
    return [f"{out}/{name}/seed{seed}" for seed in seeds for name in names]


@pytest.mark.slow
def test_a_study_that_is_killed_and_repeated_has_every_run_once(files, tmp_path):
    whole = dict(max_iters=100, eval_interval=20, eval_windows=1000)  # every evaluation takes all of val.bin
    argv = [*files(**whole, log_interval=10), "--jobs=2", "--out_dir=out", "--seeds=1,2"]
    every = folders("out", seeds=(1, 2))
    first = in_background(*argv)
    wait_until(lambda: any(Path(folder, "summary.json").exists() for folder in every))
    wait_until(lambda: sum(run_files.last_step(folder) > 20 for folder in every) >= 3)
    finished = [folder for folder in every if run_files.is_finished(folder)]
    working = [folder for folder in every if store.state(folder) == "running"]
    first.kill()
    first.join()
    for folder in working[:1]:  # one run is killed with its sweep, another lives on
        with contextlib.suppress(ProcessLookupError):
            os.kill(locks.read_note(locks.lock_path(folder))["pid"], signal.SIGKILL)
    second = in_background(*argv)
    second.join()
    assert second.exitcode == 0
    assert sorted(map(str, Path("out").glob("*/seed*/"))) == sorted(every)
    for folder in every:
        assert store.state(folder) == "finished"
        assert [record["step"] for record in records(folder, "train")] == list(range(10, 101, 10))
        assert [record["step"] for record in records(folder, "eval")] == [0, 20, 40, 60, 80, 100]
        segments = json.loads(Path(folder, "run.json").read_text())["segments"]
        assert len(segments) <= (2 if folder in working[:1] else 1), (
            "runs that were finished or lived on are not repeated"
        )
    assert finished
    seed = int(working[0][-1])
    options = dict(wq_identity=True, attn_scale=0.5) if "reduced" in working[0] else {}
    alone = TrainConfig(**{**TINY, **whole, "out_dir": "alone", "seed": seed, **options})
    expected = train.train(alone)
    assert json.loads(Path(working[0], "summary.json").read_text())["val_loss"] == expected["val_loss"]

    losses = {
        arm: [records(f"out/{arm}/seed{seed}", "eval")[-1]["val_loss"] for seed in (1, 2)]
        for arm in ("baseline", "reduced")
    }
    folder, _, verdicts = report.write_report(report.ReportConfig(runs=("out",)))
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    differences = np.subtract(losses["reduced"], losses["baseline"])
    paired = scipy.stats.ttest_rel(losses["reduced"], losses["baseline"])
    assert float(row["mean"]) == pytest.approx(differences.mean(), rel=1e-7)
    assert float(row["sd"]) == pytest.approx(differences.std(ddof=1))
    assert float(row["p"]) == pytest.approx(paired.pvalue)
    assert [float(row["low"]), float(row["high"])] == pytest.approx(list(paired.confidence_interval(0.95)))
    assert row["seeds"] == "2"
    assert row["verdict"].partition(";")[0] in verdicts[0]
    with open(folder / "runs.csv", newline="", encoding="utf-8") as file:
        reported = {(run["arm"], int(run["seed"])): float(run["val_loss"]) for run in csv.DictReader(file)}
    expected = {(arm, seed): losses[arm][seed - 1] for arm in losses for seed in (1, 2)}
    assert reported == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("of_job", [lambda i: [], lambda i: [f"--array_index={i}", "--array_size=3"]])
def test_sweeps_side_by_side_start_every_run_once(files, fake, of_job):
    argv = [*files(), "--jobs=2", "--out_dir=out", "--seeds=1,2,3,4,5"]
    processes = [in_background(*argv, *of_job(i)) for i in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(fake()) == sorted(folders("out", seeds=range(1, 6)))
    assert all(run_files.is_finished(folder) for folder in fake())


def test_a_run_whose_sweep_was_killed_keeps_its_lock_and_is_waited_for(files, fake):
    argv = [*files(), "--out_dir=out", "--seeds=1", "--jobs=2"]
    Path("wait").touch()
    first = in_background(*argv)
    wait_until(lambda: len(fake()) == 2)
    first.kill()
    first.join()
    assert [store.state(folder) for folder in folders("out", seeds=[1])] == ["running"] * 2
    second = in_background(*argv)
    time.sleep(0.5)
    assert second.is_alive()
    Path("wait").unlink()
    second.join()
    assert second.exitcode == 0
    assert sorted(fake()) == folders("out", seeds=[1])


def test_a_lock_is_free_when_its_last_holder_is_killed(tmp_path):
    lock = locks.acquire(tmp_path / "lock")
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock]) as child:
        assert locks.acquire(tmp_path / "lock") is None
        os.close(lock)
        assert locks.is_locked(tmp_path / "lock"), "the child holds it"
        child.kill()
        child.wait()
        assert not locks.is_locked(tmp_path / "lock")
        os.close(locks.acquire(tmp_path / "lock"))
    assert not locks.is_locked(tmp_path / "never")


def test_failures_are_reported_at_the_end_and_tried_again(files, fake, command):
    argv = [*files(TWO_ARMS + "grid = {'n_layer': [3, 2]}\nseeds = [1]"), "--out_dir=out", "--jobs=1"]
    code, out, _ = command(sweep.main, *argv)
    assert code == 1
    names = [f"{arm},n_layer={n}" for n in (3, 2) for arm in ("baseline", "reduced")]
    assert fake() == folders("out", names, [1])
    assert [store.state(folder) for folder in fake()] == ["failed", "failed", "finished", "finished"]
    assert "reduced,n_layer=3/seed1: exit status 1; the last lines of out/reduced,n_layer=3/seed1/log.txt:" in out
    assert "    error: three layers are too many" in out
    Path("mended").touch()
    code, out, _ = command(sweep.main, *argv)
    assert code == 0
    assert fake()[4:] == folders("out", names[:2], [1])
    assert "all 4 runs are finished" in out


def test_the_command_that_compares_the_runs_can_be_pasted(files, fake, command):
    argv = [*files(TWO_ARMS + "seeds = [1]"), "--out_dir=out/it's mine"]
    (hint,) = [line for line in command(sweep.main, *argv)[1].splitlines() if "compare them with: " in line]
    python, script, folder = shlex.split(hint.partition("compare them with: ")[2])
    assert (python, folder) == ("python", "out/it's mine")
    assert Path(script).samefile(report.__file__)
    for line in command(sweep.main, *argv, "--dry_run")[1].splitlines():
        assert line.startswith("#") or "--out_dir=out/it's mine/" in shlex.split(line)[-2]


def test_a_run_that_diverged_is_not_tried_again_until_its_file_is_deleted(files, fake, command):
    argv = [*files(TWO_ARMS + "grid = {'n_layer': [5, 2, 3]}\nseeds = [1]"), "--out_dir=out", "--jobs=1"]
    names = [f"{arm},n_layer={n}" for n in (5, 2, 3) for arm in ("baseline", "reduced")]
    code, out, _ = command(sweep.main, *argv)
    assert code == 1
    assert fake() == folders("out", names, [1])
    assert [store.state(folder) for folder in fake()] == ["diverged"] * 2 + ["finished"] * 2 + ["failed"] * 2
    assert "2 of 6 runs done, 2 failed, 2 diverged\n" in out
    assert "baseline,n_layer=5/seed1: diverged at step 17; see out/baseline,n_layer=5/seed1/nonfinite.json" in out
    assert "2 of 6 runs diverged; to try one again, delete its nonfinite.json" in out
    assert "2 of 6 runs failed; repeat the command" in out and "baseline,n_layer=5/seed1: exit status" not in out
    assert "2 failed, 2 diverged, 2 finished" in command(sweep.main, *argv, "--watch=1")[1]
    Path("mended").touch()
    damaged = Path(folders("out", names, [1])[0], "nonfinite.json")
    damaged.write_text('{"step": 1')
    code, out, _ = command(sweep.main, *argv)
    assert code == 1, "not all runs are finished"
    assert f"baseline,n_layer=5/seed1: diverged; {damaged} is not JSON" in out
    assert "reduced,n_layer=5/seed1: diverged at step 17" in out, "the listing goes on"
    assert fake()[6:] == folders("out", names[4:], [1]), "what failed is tried again"
    assert "4 of 6 runs done, 2 diverged\n" in out and "runs failed" not in out
    for folder in folders("out", names[:2], [1]):
        Path(folder, "nonfinite.json").unlink()
    code, out, _ = command(sweep.main, *argv)
    assert (code, fake()[8:]) == (0, folders("out", names[:2], [1]))
    assert "all 6 runs are finished" in out


def test_a_run_that_diverged_is_listed_in_the_report(tmp_path):
    folder = write_study(tmp_path / "study", {"baseline": {}, "reduced": {"beta1": 0.5}}, lambda arm, seed: 2.0)
    run = folder / "reduced/seed2"
    (run / "summary.json").rename(run / "nonfinite.json")
    cfg = report.ReportConfig(runs=(str(folder),))
    assert "- reduced/seed2: diverged, step 40 of 40" in (report.write_report(cfg)[0] / "report.md").read_text()


def test_fail_fast_stops_the_others(files, fake, command):
    Path("wait").touch()
    text = "arms = {'good': '', 'bad': '--n_layer=3', 'later': '--n_layer=4'}\ncontrol = 'good'\nseeds = [1]"
    code, out, _ = command(sweep.main, *files(text), "--out_dir=out", "--jobs=2", "--fail_fast")
    assert code == 1
    assert fake() == ["out/good/seed1", "out/bad/seed1"] or fake() == ["out/bad/seed1", "out/good/seed1"]
    assert [store.state(f"out/{name}/seed1") for name in ("good", "bad", "later")] == [
        "stopped",
        "failed",
        "not started",
    ]
    assert "bad/seed1: exit status 1" in out and "good/seed1:" not in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs_and_the_same_command_goes_on(files, fake, command, number):
    argv = [*files(), "--out_dir=out", "--jobs=2", "--seeds=1"]
    Path("wait").touch()
    process = in_background(*argv)
    wait_until(lambda: all(run_files.last_step(folder) for folder in folders("out", seeds=[1])))
    os.killpg(process.pid, number)  # Ctrl-C goes to all of a terminal's foreground group
    process.join()
    assert process.exitcode == 130
    for folder in folders("out", seeds=[1]):
        assert "Interrupt" not in Path(folder, "log.txt").read_text(), "only the sweep signals its runs, once"
    assert [store.state(folder) for folder in folders("out", seeds=[1])] == ["stopped"] * 2
    Path("wait").unlink()
    assert command(sweep.main, *argv)[0] == 0
    assert len(fake()) == 4


def test_a_sweep_stops_its_runs_in_time_and_the_same_command_goes_on(files, fake, command):
    argv = [*files(), "--out_dir=out", "--jobs=2", "--seeds=1"]
    Path("wait").touch()
    status, out, _ = command(sweep.main, *argv, "--max_seconds=3")
    assert status == 75
    assert "stopped after 3 seconds; repeat the command to continue" in out
    assert [store.state(folder) for folder in folders("out", seeds=[1])] == ["stopped"] * 2
    Path("wait").unlink()
    assert command(sweep.main, *argv, "--max_seconds=100")[0] == 0
    assert len(fake()) == 4


def test_each_of_several_gpus_has_one_run_and_threads_are_divided(files, fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs, _ = planned(*files(), "--out_dir=out")
    assert workers.Execution(runs, jobs=3, gpus=["4", "7", "GPU-c"]).execute()
    logs = [(run.folder / "log.txt").read_text().splitlines()[1].split() for run in runs]
    assert {gpu for _, gpu, _, _ in logs} == {"4", "7", "GPU-c"}
    assert {threads for *_, threads in logs} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


@pytest.mark.parametrize("n_runs, n_ended, threads", [(2, 0, "4"), (4, 1, "2"), (2, 1, "None"), (4, 0, "2")])
def test_all_cores_have_work_where_there_are_fewer_runs_than_cores(files, fake, monkeypatch, n_runs, n_ended, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "available_cpus", lambda: 8)
    runs = planned(*files(), "--out_dir=out")[0][:n_runs]
    for run in runs[:n_ended]:
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text("{}")
    assert workers.Execution(runs, jobs=8).execute()
    logs = [(run.folder / "log.txt").read_text().splitlines()[1].split() for run in runs[n_ended:]]
    assert {found for *_, found in logs} == {threads}


def test_a_run_that_fails_in_another_sweep_meanwhile_is_not_tried_again(files, fake):
    text = "arms = {'bad': '--n_layer=3'}\ncontrol = 'bad'\nseeds = [1]"
    runs, _ = planned(*files(text), "--out_dir=out")
    ours, theirs = (workers.Execution(runs, jobs=1) for _ in range(2))
    assert theirs.execute() is False
    assert ours.execute() is False
    assert list(ours.failed.values()) == ["exit status 1, in another sweep"]
    assert len(fake()) == 1


def test_a_dry_run_prints_what_would_run_and_touches_nothing(files, fake, command):
    argv = [*files(), "--max_iters=12", "--jobs=2"]
    before = sorted(Path.cwd().rglob("*"))
    code, out, _ = command(sweep.main, *argv, "--dry_run")
    assert (code, fake(), sorted(Path.cwd().rglob("*"))) == (0, [], before)
    runs, _ = planned(*argv[:2], options=argv[2:3])
    words = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    assert words == [[sys.executable, "fake.py", *run.arguments] for run in runs]
    per_token = [cost(run.config.model_config()).training_flops for run in runs]
    tokens = 12 * TINY["tokens_per_step"]
    assert f"# all: 6 runs, {6 * tokens:,} tokens, {sum(per_token) * tokens:.2e} training FLOPs" in out
    (runs[0].folder).mkdir(parents=True)
    (runs[0].folder / "summary.json").write_text("{}")
    (runs[1].folder).mkdir(parents=True)
    (runs[1].folder / "nonfinite.json").write_text("{}")
    _, out, _ = command(sweep.main, *argv, "--dry_run", "--array_index=0", "--array_size=2")
    assert f"# remaining: 2 runs, {2 * tokens:,} tokens" in out
    assert out == command(sweep.main, *argv, "--dry_run", "--index=0", "--of=2")[1], "the old names"
    assert "baseline/seed1: finished" in out and "reduced/seed1: diverged" in out and "/seed2" not in out


def test_options_outside_a_run_s_identity_do_not_change_its_result(tiny):
    results = {}
    shutil.copytree("data", "elsewhere")
    for changes in (
        dict(out_dir="first"),
        *(dict(batch_size=4), dict(log_interval=3), dict(save_steps=(3,)), dict(diagnostics=True)),
        *(dict(data_dir="elsewhere"), dict(device="cpu"), dict(compile=False), dict(recompute=True)),
        *(dict(seed=1), dict(weight_decay=0.5), dict(attn_scale=0.5), dict(max_iters=7), dict(dtype="bfloat16")),
    ):
        cfg = tiny(**{"out_dir": "_".join(changes), "max_iters": 6, **changes})
        digest = run_files.digest(dataclasses.asdict(cfg))
        results.setdefault(digest, []).append(train.train(cfg)["val_loss"])
    first, *others = results.values()
    assert len(first) == 9 and [len(losses) for losses in others] == [1] * 5
    assert first == pytest.approx([first[0]] * 9, rel=1e-6)
    for (loss,) in others:
        assert loss != pytest.approx(first[0], rel=1e-6)
    assert NO_PART_OF_RESULT <= {each.name for each in dataclasses.fields(TrainConfig)}


def test_a_finished_study_takes_options_that_change_no_result_and_no_others(files, fake, command, refuses):
    argv = [*files(), "--out_dir=out"]
    runs, _ = planned(*argv)
    for run in runs:
        run.folder.mkdir(parents=True)
        stored = dataclasses.asdict(run.config)
        del stored["load_balance"]  # as if the run were older than this field
        (run.folder / "config.json").write_text(json.dumps(stored))
        (run.folder / "summary.json").write_text("{}")
    assert command(sweep.main, *argv, "--batch_size=4", "--log_interval=5", "--device=cpu", "--seeds=3,2")[0] == 0
    assert fake() == []
    assert store.read_study("out")["seeds"] == [2, 3]
    assert store.read_study("out")["command"].endswith("--device=cpu --seeds=3,2")
    words = ["out/baseline/seed1", "beta2 is 0.95 there and 0.99 here", "max_iters is 40 there", "--out_dir"]
    refuses(sweep.main, *argv, "--beta2=0.99", "--max_iters=41", words=words)
    assert command(sweep.main, *argv, "--seeds=1")[0] == 0
    assert store.read_study("out")["seeds"] == [1, 2, 3]
    command_of_all = "python sweep.py my_study.py tiny.py --seeds=1,2,3"
    assert store.read_study("out")["command"] == command_of_all, "which repeats the whole study"
    assert command(sweep.main, *argv)[0] == 0
    assert store.read_study("out")["command"] == command_of_all.removesuffix(" --seeds=1,2,3")
    other = TWO_ARMS + "grid = {'beta1': [0.5]}"
    refuses(
        sweep.main,
        *files(other),
        "--out_dir=out",
        words=["out already contains a different study (python sweep.py my_study.py"],
    )
    files()
    (runs[0].folder / "config.json").write_text('{"n_heads": 3}')
    refuses(sweep.main, *argv, words=["out/baseline/seed1/config.json", "did you mean n_head?"])


def test_the_last_step_is_found_in_a_long_file_whose_last_line_is_incomplete(tmp_path):
    assert run_files.last_step(tmp_path) == 0
    lines = [json.dumps({"step": step, "kind": "train", "loss": "x" * 1000}) for step in range(300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 300, "kin')
    assert run_files.last_step(tmp_path) == 299


def test_a_cpu_has_a_run_for_each_core_as_far_as_the_memory_reaches(files, monkeypatch):
    runs, _ = planned(*files(), "--out_dir=out")
    monkeypatch.setattr(devices, "available_cpus", lambda: 6)
    for gib, jobs in ((64, 6), (8, 4), (1, 1)):
        monkeypatch.setattr(devices, "memory_bytes", lambda _, gib=gib: gib * 2**30)
        assert sweep.jobs_of_a_cpu(runs) == jobs
