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
from run_folders import write_study

import configurator
import report
import sweep
import train
from engine import run_files
from engine.flops import cost
from studies import status, store, workers
from studies.plan import plan, share
from train_config import NO_PART_OF_RESULT, TrainConfig

ROOT = Path(sweep.__file__).parent
STUDIES = sorted(ROOT.glob("config/study_*.py"))

NORMS = ("layernorm", "rmsnorm", "none")
TWO_ARMS = """
arms = {"baseline": "", "reduced": "--wq_identity --attn_scale=0.5"}
control = "baseline"
"""

# Behaves like train.py towards a sweep, in milliseconds: waits while the file `wait` exists, fails at n_layer=3 and
# diverges at n_layer=5.
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
def files(tiny, tmp_path):
    """Write a study's file of the given text, and one that sets the tiny size; the names of both."""
    tiny()

    def write(text=TWO_ARMS, **more):
        Path("my_study.py").write_text(text)
        Path("tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in {**TINY, **more}.items()))
        return ["my_study.py", "tiny.py"]

    return write


@pytest.fixture
def fake(monkeypatch):
    """Let sweeps start a stand-in for train.py, and give the list of the folders that it was started for."""
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
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def folders(out, names=("baseline", "reduced"), seeds=(1, 2, 3)):
    return [f"{out}/{name}/seed{seed}" for seed in seeds for name in names]


def planned(*argv, options=()):
    return plan(configurator.parse(sweep.SweepConfig, list(argv), positional="files"), list(options))


def records(folder, kind):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.slow
def test_a_study_that_is_killed_and_started_again_has_every_run_once(files, tmp_path):
    whole = dict(max_iters=100, eval_interval=20, eval_windows=1000)  # every evaluation takes all of val.bin
    argv = [*files(**whole, log_interval=10), "--jobs=2", "--out_dir=out"]
    first = in_background(*argv)
    wait_until(lambda: any(Path(folder, "summary.json").exists() for folder in folders("out")))
    wait_until(lambda: sum(run_files.last_step(folder) > 20 for folder in folders("out")) >= 3)
    finished = [folder for folder in folders("out") if run_files.is_finished(folder)]
    working = [folder for folder in folders("out") if store.state(folder) == "running"]
    first.kill()
    first.join()
    for folder in working[:1]:  # one run is killed with its sweep, another lives on
        with contextlib.suppress(ProcessLookupError):
            os.kill(store.read_note(store.lock_path(folder))["pid"], signal.SIGKILL)
    second = in_background(*argv)
    second.join()
    assert second.exitcode == 0
    assert sorted(map(str, Path("out").glob("*/seed*/"))) == sorted(folders("out"))
    for folder in folders("out"):
        assert store.state(folder) == "finished"
        assert [record["step"] for record in records(folder, "train")] == list(range(10, 101, 10))
        assert [record["step"] for record in records(folder, "eval")] == [0, 20, 40, 60, 80, 100]
        segments = json.loads(Path(folder, "run.json").read_text())["segments"]
        assert len(segments) <= (2 if folder in working[:1] else 1), "what was finished or lived on is not repeated"
    assert finished
    seed = int(working[0][-1])
    options = dict(wq_identity=True, attn_scale=0.5) if "reduced" in working[0] else {}
    alone = TrainConfig(**{**TINY, **whole, "out_dir": "alone", "seed": seed, **options})
    expected = train.train(alone)
    assert json.loads(Path(working[0], "summary.json").read_text())["val_loss"] == expected["val_loss"]

    losses = {
        arm: [records(f"out/{arm}/seed{seed}", "eval")[-1]["val_loss"] for seed in (1, 2, 3)]
        for arm in ("baseline", "reduced")
    }
    folder, _, verdicts = report.report(report.ReportConfig(runs=("out",)))
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    differences = np.subtract(losses["reduced"], losses["baseline"])
    paired = scipy.stats.ttest_rel(losses["reduced"], losses["baseline"])
    assert float(row["mean"]) == pytest.approx(differences.mean(), abs=1e-12)
    assert float(row["sd"]) == pytest.approx(differences.std(ddof=1))
    assert float(row["p"]) == pytest.approx(paired.pvalue)
    assert [float(row["low"]), float(row["high"])] == pytest.approx(list(paired.confidence_interval(0.95)))
    assert row["seeds"] == "3"
    assert row["verdict"] in verdicts[0]
    with open(folder / "runs.csv", newline="", encoding="utf-8") as file:
        reported = {(run["arm"], int(run["seed"])): float(run["val_loss"]) for run in csv.DictReader(file)}
    assert reported == {(arm, seed): losses[arm][seed - 1] for arm in losses for seed in (1, 2, 3)}


@pytest.mark.parametrize("shares", [[], ["--index=0", "--index=1", "--index=2"]])
def test_sweeps_side_by_side_start_every_run_once(files, fake, shares):
    argv = [*files(), "--jobs=2", "--out_dir=out", "--seeds=1,2,3,4,5"]
    processes = [in_background(*argv, *([share, "--of=3"] if share else [])) for share in shares or [None] * 3]
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
    lock = store.acquire(tmp_path / "lock")
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock]) as child:
        assert store.acquire(tmp_path / "lock") is None
        os.close(lock)
        assert store.is_locked(tmp_path / "lock"), "the child holds it"
        child.kill()
        child.wait()
        assert not store.is_locked(tmp_path / "lock")
        os.close(store.acquire(tmp_path / "lock"))
    assert not store.is_locked(tmp_path / "never")


def test_failures_are_reported_at_the_end_and_tried_again(files, fake, command):
    argv = [*files(TWO_ARMS + "grid = {'n_layer': [3, 2]}\nseeds = [1]"), "--out_dir=out"]
    code, out, _ = command(sweep.main, *argv)
    assert code == 1
    names = [f"{arm},n_layer={n}" for n in (3, 2) for arm in ("baseline", "reduced")]
    assert fake() == folders("out", names, [1])
    assert [store.state(folder) for folder in fake()] == ["failed", "failed", "finished", "finished"]
    assert "reduced,n_layer=3/seed1: exit status 1; the end of out/reduced,n_layer=3/seed1/log.txt:" in out
    assert "    error: three layers are too many" in out
    Path("mended").touch()
    code, out, _ = command(sweep.main, *argv)
    assert code == 0
    assert fake()[4:] == folders("out", names[:2], [1])
    assert "all 4 runs are finished" in out


def test_a_run_that_diverged_is_not_tried_again_until_its_file_is_deleted(files, fake, command):
    argv = [*files(TWO_ARMS + "grid = {'n_layer': [5, 2, 3]}\nseeds = [1]"), "--out_dir=out"]
    names = [f"{arm},n_layer={n}" for n in (5, 2, 3) for arm in ("baseline", "reduced")]
    code, out, _ = command(sweep.main, *argv)
    assert code == 1
    assert fake() == folders("out", names, [1])
    assert [store.state(folder) for folder in fake()] == ["diverged"] * 2 + ["finished"] * 2 + ["failed"] * 2
    assert "2 of 6 runs done, 2 failed, 2 diverged\n" in out
    assert "baseline,n_layer=5/seed1: diverged at step 17; see out/baseline,n_layer=5/seed1/nonfinite.json" in out
    assert "2 of 6 runs diverged; the same command does not try one again unless you delete its nonfinite.json" in out
    assert "2 of 6 runs did not end" in out and "baseline,n_layer=5/seed1: exit status" not in out
    assert "2 failed, 2 diverged, 2 finished" in command(sweep.main, *argv, "--watch=1")[1]
    Path("mended").touch()
    code, out, _ = command(sweep.main, *argv)
    assert code == 1, "not all runs are finished"
    assert fake()[6:] == folders("out", names[4:], [1]), "what failed is tried again"
    assert "4 of 6 runs done, 2 diverged\n" in out and "did not end" not in out
    for folder in folders("out", names[:2], [1]):
        Path(folder, "nonfinite.json").unlink()
    code, out, _ = command(sweep.main, *argv)
    assert (code, fake()[8:]) == (0, folders("out", names[:2], [1]))
    assert "all 6 runs are finished" in out


def test_a_run_that_diverged_is_told_in_the_report(tmp_path):
    folder = write_study(tmp_path / "study", {"baseline": {}, "reduced": {"beta1": 0.5}}, lambda arm, seed: 2.0)
    run = folder / "reduced/seed2"
    (run / "summary.json").rename(run / "nonfinite.json")
    cfg = report.ReportConfig(runs=(str(folder),))
    assert f"- {run}: diverged, step 40" in (report.report(cfg)[0] / "report.md").read_text()


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
        assert "Interrupt" not in Path(folder, "log.txt").read_text(), "a run is told by its sweep alone, and once"
    assert [store.state(folder) for folder in folders("out", seeds=[1])] == ["stopped"] * 2
    Path("wait").unlink()
    assert command(sweep.main, *argv)[0] == 0
    assert len(fake()) == 4


def test_each_of_several_gpus_has_one_run_and_threads_are_divided(files, fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs, _ = planned(*files(), "--out_dir=out")
    assert workers.Execution(runs, jobs=3, gpus=["4", "7", "GPU-c"]).execute()
    logs = [(run.folder / "log.txt").read_text().splitlines()[1].split() for run in runs]
    assert {gpu for _, gpu, _, _ in logs} == {"4", "7", "GPU-c"}
    assert {threads for *_, threads in logs} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


def test_the_arms_of_a_seed_come_before_the_next_seed_and_pairs_side_by_side(files):
    text = (
        TWO_ARMS
        + "grid = {'weight_decay': [0, 2**-5], 'attn_scale': [0.5, 1]}\nseeds = [7, 3]\nsettings = '--beta1=0.5'"
    )
    runs, content = planned(*files(text), options=["--max_iters=8"])
    seeds = [run.seed for run in runs]
    assert seeds == [7] * 8 + [3] * 8
    assert [run.name for run in runs[:4]] == [
        "baseline,weight_decay=0,attn_scale=0.5",
        "reduced,weight_decay=0,attn_scale=0.5",
        "baseline,weight_decay=0,attn_scale=1",
        "reduced,weight_decay=0,attn_scale=1",
    ]
    for run, entry in zip(runs, content["arms"] * 2, strict=True):
        values = {**entry["point"], "seed": run.seed, "data_seed": run.seed, "max_iters": 8, "beta1": 0.5, "n_embd": 16}
        assert {name: getattr(run.config, name) for name in values} == values
        assert run.config.wq_identity == (entry["arm"] == "reduced")
        assert run.config == TrainConfig(**configurator.read(TrainConfig, run.arguments)), "what the process will read"
        assert run.config.out_dir == str(run.folder) == f"out/my_study-tiny/{run.name}/seed{run.seed}"
    assert content["grid"] == {"weight_decay": [0.0, 2**-5], "attn_scale": [0.5, 1.0]}
    assert content["name"] == "my_study-tiny"
    for entry in content["arms"]:  # what the arm's own arguments set, be it in the grid or not
        own = {"baseline": (0.1, 1.0), "reduced": (0.1, 0.5)}[entry["arm"]]
        assert entry["configured"] == dict(zip(("weight_decay", "attn_scale"), own, strict=True))


@pytest.mark.parametrize("of", range(1, 14))
def test_shares_hold_every_run_once_and_all_arms_together(files, of):
    runs, content = planned(*files(TWO_ARMS + "grid = {'beta1': [0.5, 0.9]}"))
    parts = [share(runs, content["arms"], index, of) for index in range(of)]
    assert sorted(run.label for part in parts for run in part) == sorted(run.label for run in runs)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= (2 if of <= 6 else 1)
    for part in parts if of <= 6 else ():
        groups = {}
        for run in part:
            arm, _, point = run.name.partition(",")
            groups.setdefault((point, run.seed), set()).add(arm)
        assert set(map(frozenset, groups.values())) == {frozenset({"baseline", "reduced"})}


@pytest.mark.parametrize("of", [2, 3, 4, 6])
def test_a_share_holds_pairs_where_each_arm_has_a_control_of_its_own(files, of):
    arms = {f"{name}-{arm}": f"--norm={name}{' --wq_identity' * (arm == 'b')}" for name in NORMS for arm in "ab"}
    control = {f"{name}-b": f"{name}-a" for name in NORMS}
    runs, content = planned(*files(f"arms = {arms}\ncontrol = {control}\nseeds = [1, 2]"))
    parts = [share(runs, content["arms"], index, of) for index in range(of)]
    assert sorted(run.label for part in parts for run in part) == sorted(run.label for run in runs)
    for part in parts:
        assert {(run.seed, run.name[:-2]) for run in part if run.name[-1] == "a"} == {
            (run.seed, run.name[:-2]) for run in part if run.name[-1] == "b"
        }


def test_arms_that_are_each_other_s_control_are_shared_out_together(files):
    two, three = "{'a': '', 'b': '--wq_identity'}", "{'a': '', 'b': '--wq_identity', 'c': '--wk_identity'}"
    for arms, control, names in (
        (two, "{'a': 'b', 'b': 'a'}", ["a", "b"]),
        (three, "{'a': 'b', 'b': 'c', 'c': 'b'}", ["a", "b", "c"]),  # the first leads into the ring
    ):
        runs, content = planned(*files(f"arms = {arms}\ncontrol = {control}"))
        parts = [share(runs, content["arms"], index, 3) for index in range(3)]
        assert [[run.name for run in part] for part in parts] == [names] * 3


def test_braces_stand_for_the_size_and_values_bring_arguments_along(files):
    text = """
arms = {"a": "--mlp_ratio={mlp_ratio}/2", "b": "--wq_identity"}
control = {"b": "a"}
grid = {"n_embd": {"{n_embd}//2": "--n_head={n_head}//2", "{n_embd}*2": "--n_head={n_head}*2"}}
seeds = [1]
"""
    runs, content = planned(*files(text, n_embd=32, n_head=4))
    assert [(run.config.n_embd, run.config.mlp_ratio) for run in runs] == [(16, 2), (16, 4), (64, 2), (64, 4)]
    assert [(entry["point"], entry["control"]) for entry in content["arms"][1:3]] == [
        ({"n_embd": 16}, "a"),
        ({"n_embd": 64}, "a"),
    ]
    assert [run.config.n_head for run in runs] == [2, 2, 8, 8]


def test_a_failure_that_another_sweep_met_is_not_repeated_at_once(files, fake):
    text = "arms = {'bad': '--n_layer=3'}\ncontrol = 'bad'\nseeds = [1]"
    runs, _ = planned(*files(text), "--out_dir=out")
    ours, theirs = (workers.Execution(runs, jobs=1) for _ in range(2))
    assert theirs.execute() is False
    assert ours.execute() is False
    assert list(ours.failed.values()) == ["exit status 1, in another sweep"]
    assert len(fake()) == 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [[], ["config/quick.py"]], ids=["paper", "quick"])
def test_every_study_is_valid_at_the_paper_s_size_and_at_the_quick_one(path, size, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, content = planned(f"config/{path.name}", *size)
    arms = {entry["arm"] for entry in content["arms"]}
    for entry in content["arms"]:
        assert entry["control"] in arms
    objectives = {(run.name.partition(",")[0], run.config.objective) for run in runs}
    controls = {entry["arm"]: entry["control"] for entry in content["arms"]}
    objective = dict(objectives)
    assert all(objective[arm] == objective[control] for arm, control in controls.items()), "losses that compare"
    assert len(runs) == len(content["arms"]) * len(content["seeds"])
    assert len(content["seeds"]) == (5 if path.stem == "study_table2" else 3)


@pytest.mark.parametrize("size", [[], ["config/quick.py"]], ids=["paper", "quick"])
def test_arms_that_are_compared_at_equal_parameters_have_them(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, content = planned("config/study_params.py", *size, "--seeds=1")
    total = {run.name: cost(run.config.model_config()).total for run in runs}
    assert total["baseline"] == total["reduced_mlp4p5"]
    assert total["reduced"] == total["baseline_mlp3p5"] < total["baseline"]
    assert total["baseline_narrow"] == pytest.approx(total["reduced"], rel=0.025)
    for entry in content["arms"]:
        assert total[entry["name"]] == pytest.approx(total[entry["control"]], rel=0.025)
    widths = {run.name: run.config.n_embd for run in runs}
    assert widths["baseline_narrow"] == (124 if size else 744)


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
    _, out, _ = command(sweep.main, *argv, "--dry_run", "--index=0", "--of=2")
    assert f"# left: 2 runs, {2 * tokens:,} tokens" in out
    assert "baseline/seed1: finished" in out and "reduced/seed1: diverged" in out and "/seed2" not in out


def test_what_is_no_part_of_a_run_s_identity_does_not_change_its_result(tiny):
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
    refuses(sweep.main, *files(other), "--out_dir=out", words=["out holds another study (python sweep.py my_study.py"])
    files()
    (runs[0].folder / "config.json").write_text('{"n_heads": 3}')
    refuses(sweep.main, *argv, words=["out/baseline/seed1/config.json", "did you mean n_head?"])


def test_runs_have_names_of_their_own_in_wandb(files):
    runs, _ = planned(*files(), options=["--wandb_log"])
    names = [TrainConfig(**configurator.read(TrainConfig, run.arguments)).wandb_run_name for run in runs]
    assert names == [f"my_study-tiny/{run.name}/seed{run.seed}" for run in runs]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arms = {'a': ''}", ["my_study.py", "no arms and control"]),
        ("arms = ['a']\ncontrol = 'a'", ["line 1", "arms must be a dict such as"]),
        ("arms = {'a/b': ''}\ncontrol = 'a/b'", ["line 1", "letters"]),
        ("arms = {'a': ''}\ncontrol = 'b'", ["line 2", "control must be of the arms a", "'b'"]),
        ("arms = {'a': ''}\ncontrol = {'a': 'b'}", ["line 2", "control must be of the arms a"]),
        ("arms = {'a': ''}\ncontrol = 'a'\nseed = [1]", ["line 3", "'seed'", "did you mean seeds?"]),
        ("arms = {'a': ''}\ncontrol = 'a'\nseeds = [1, 1]", ["line 3", "each once"]),
        ("arms = {'a': ''}\ncontrol = 'a'\nseeds = 3", ["line 3", "a list, each a whole number"]),
        ("arms = {'a': ''}\ncontrol = 'a'\nsettings = 3", ["line 3", "settings must be a text"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_layer': 3}", ["line 3", "field -> list"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_layer': []}", ["line 3", "field -> list"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_layers': [3]}", ["grid", "did you mean n_layer?"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_layer': [3, 'x']}", ["grid: n_layer must be a whole number", "'x'"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_layer': ['{n_layers}*2']}", ["{n_layers}", "field of train.py"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'seed': [3]}", ["grid: seed", "the sweep sets"]),
        ("arms = {'a': ''}\ncontrol = 'a'\ngrid = {'n_head': [2, 3]}", ["a,n_head=3: ", "n_embd=16", "n_head=3"]),
        ("arms = {'a': '--n_head'}\ncontrol = 'a'", ["a: ", "--n_head needs a value"]),
        ("arms = {'a': 'nowhere.py'}\ncontrol = 'a'", ["a: ", "nowhere.py"]),
        ("arms = {'a': '', 'b': '--beta1=0.9'}\ncontrol = 'a'", ["a/seed1 and b/seed1 are the same run"]),
        ("arms = {'a': '', 'b': '--n_layer=1'}\ncontrol = 'a'\nsettings = '--n_layer=4'", ["are the same run"]),
    ],
)
def test_mistakes_in_a_study_end_in_one_line_before_anything_runs(files, fake, refuses, text, words):
    refuses(sweep.main, *files(text), words=words)
    assert fake() == [] and not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed=3"], ["--seed is what the sweep sets"]),
        (["--resume"], ["--resume is what the sweep sets"]),
        (["--n_embd=32"], ["--n_embd is in the grid of my_study.py"]),
        (["--n_head=4"], ["--n_head is in the grid of my_study.py"]),
        (["--job=2"], ["'job'", "did you mean jobs?"]),
        (["--learning_rat=1"], ["'learning_rat'", "did you mean learning_rate?"]),
        (["--learning_rate=0"], ["baseline,n_embd=16: learning_rate must be positive"]),
        (["--jobs=0"], ["jobs must be positive"]),
        (["--index=2", "--of=2"], ["index=2", "of=2"]),
        (["--seeds=1,1"], ["seeds must be given, each once"]),
        (["--watch=-1"], ["watch must be"]),
        (["--watch=1"], ["out/my_study-tiny", "study.json"]),
        (["--dataset=missing"], ["data/missing/train.bin"]),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(files, fake, refuses, options, words):
    refuses(sweep.main, *files(TWO_ARMS + "grid = {'n_embd': {16: '--n_head=2'}}"), *options, words=words)
    assert fake() == [] and not Path("out").exists()


def test_the_size_s_file_does_not_come_first(files, refuses):
    refuses(sweep.main, *reversed(files()), words=["tiny.py", "not a study", "a study comes first"])
    refuses(sweep.main, words=["python sweep.py config/study_"])
    refuses(sweep.main, "--out_dir=out", words=["python sweep.py config/study_"])


def test_the_view_says_what_the_files_say(files, fake, command):
    argv = [*files(TWO_ARMS + "grid = {'beta1': [0.5, 0.9]}\nseeds = [1]"), "--out_dir=out"]
    runs, content = planned(*argv)
    store.write_study("out", content)
    for number, run in enumerate(runs[:3]):
        train.train(dataclasses.replace(run.config, max_iters=20 + 10 * (number == 1)))
    Path(runs[1].folder, "summary.json").unlink()
    Path(runs[2].folder, "summary.json").unlink()
    lock = store.acquire(store.lock_path(runs[2].folder))
    with open(runs[2].folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "ki')  # the writer is in the middle of a line
    table = {row["run"]: row for row in status.rows("out", store.read_study("out"))}
    losses = [{r["step"]: r["val_loss"] for r in records(run.folder, "eval")} for run in runs[:2]]
    first, second, third, last = (table[run.label] for run in runs)
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


def test_the_view_fits_its_terminal_and_shows_work_first():
    table = [
        dict(run=f"arm/seed{n}", state="not started", **dict.fromkeys(list(status.COLUMNS)[2:])) for n in range(50)
    ]
    table[40]["state"], table[45]["state"] = "failed", "running"
    lines = status.view("study", table, width=30, height=12).splitlines()
    assert len(lines) < 12 and max(map(len, lines)) <= 30
    lines = status.view("study", table, width=100, height=12).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["arm/seed45", "running"], ["arm/seed40", "failed"]]
    assert int(lines[-1].split()[2]) == 50 - (len(lines) - 3)
    assert len(status.view("study", table).splitlines()) == 52
    table[0]["run"] = "an,arm=with,a=very,long=name/seed17"
    lines = status.view("study", table[:2], width=70).splitlines()
    assert {len(line) for line in lines[1:]} == {70}
    assert lines[2].startswith("an,arm=") and "…" in lines[2] and "/seed17  not started" in lines[2]


def test_the_last_step_is_found_in_a_long_file_whose_last_line_is_not_whole(tmp_path):
    assert run_files.last_step(tmp_path) == 0
    lines = [json.dumps({"step": step, "kind": "train", "loss": "x" * 1000}) for step in range(300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 300, "kin')
    assert run_files.last_step(tmp_path) == 299
