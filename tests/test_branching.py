"""A branch: a run in a folder of its own that goes on from the checkpoint of another, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_folders import TWO_ARMS, planned, write_study_files
from trained import assert_equal_weights, metrics, stop_after, weights

import sweep
import train
from engine import checkpoint, resuming
from engine.files import read_json

WSD = dict(schedule="wsd", decay_iters=8)


def assert_same_run(one, other):
    """Equal to the bit: weights, optimizer, random state, records, and what was found in the end."""
    assert_equal_weights(weights(one), weights(other))
    states = [checkpoint.load(f"{folder}/ckpt.pt") for folder in (one, other)]
    assert torch.equal(*(state["rng"]["cpu"] for state in states))
    first, second = (state["optimizer"]["state"] for state in states)
    assert first.keys() == second.keys()
    for index, entry in first.items():
        assert all(torch.equal(tensor, second[index][name]) for name, tensor in entry.items())
    assert metrics(one) == metrics(other)
    losses = [read_json(f"{folder}/summary.json") for folder in (one, other)]
    assert losses[0]["val_loss"] == losses[1]["val_loss"]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]


@pytest.mark.parametrize("step", [20, 23])  # with and without an evaluation
@pytest.mark.parametrize("options", [{}, dict(WSD, dropout=0.2, batch_size=4, wq_identity=True)])
def test_a_branch_with_the_same_options_is_the_run_that_it_comes_from(tiny, monkeypatch, step, options):
    train.train(tiny(out_dir="straight", **options))
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        train.train(tiny(out_dir="first", **options))
    before = {path.name: path.read_bytes() for path in Path("first").iterdir()}
    train.train(tiny(out_dir="branch", branch_from="first/ckpt.pt", **options))
    assert_same_run("straight", "branch")
    assert before == {path.name: path.read_bytes() for path in Path("first").iterdir()}


def test_short_decays_from_one_long_run_are_the_short_runs(tiny, command):
    long = tiny(out_dir="long", save_steps=(12, 20, 30), **WSD)
    train.train(long)
    for step in (12, 20, 30):  # 30 is the last before the decay but two
        n = step + 8
        train.train(tiny(out_dir=f"short{n}", **{**WSD, "max_iters": n}))
        # What the long run was started with is not repeated.
        call = [f"--branch_from=long/step_{step:06d}.pt", f"--max_iters={n}", f"--out_dir=branch{n}"]
        assert command(train.main, *call)[0] == 0
        assert_same_run(f"short{n}", f"branch{n}")
        shared = [r for r in metrics(f"branch{n}") if r["step"] <= step]
        assert shared == [r for r in metrics("long") if r["step"] <= step]
        segments = read_json(f"branch{n}/run.json")["segments"]
        assert [segment["step"] for segment in segments] == [0, step]
        assert segments[1]["changed"] == {}, "no rate behind it: as a whole it is a run of its own options"


def test_a_branch_that_changes_what_is_behind_it_says_so(tiny):
    train.train(tiny(out_dir="cosine", max_iters=20))  # whose rates depend on its length
    train.train(tiny(out_dir="branch", branch_from="cosine/ckpt.pt", max_iters=30))
    changed = [segment["changed"] for segment in read_json("branch/run.json")["segments"]]
    assert changed == [{}, {"max_iters": [20, 30]}]


def test_a_branch_that_ends_before_its_first_checkpoint_begins_again(tiny, monkeypatch, command):
    train.train(tiny(out_dir="straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        train.train(tiny(out_dir="first"))

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save", killed)
        with pytest.raises(SystemExit):
            train.main(["--branch_from=first/ckpt.pt", "--out_dir=branch", "--beta2=0.95"])
    assert Path("branch/config.json").exists() and not Path("branch/ckpt.pt").exists()
    shutil.copytree("branch", "again")
    for folder in ("branch", "again"):
        status, out, _ = command(train.main, f"--out_dir={folder}", "--resume")
        assert status == 0 and "the run begins at that of first/ckpt.pt" in out
        assert_same_run("straight", folder)


def test_a_branch_stays_what_it_is_when_resumed(tiny, monkeypatch, command):
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        train.train(tiny(out_dir="first", **WSD))
    with monkeypatch.context() as patch:
        stop_after(patch, 17)
        assert command(train.main, "--branch_from=first/ckpt.pt", "--max_iters=30", "--out_dir=branch")[0] == 130
    shutil.rmtree("first")  # no longer needed
    assert command(train.main, "--out_dir=branch", "--resume")[0] == 0
    train.train(tiny(out_dir="straight", **{**WSD, "max_iters": 30}))
    assert_same_run("straight", "branch")
    best = min((r for r in metrics("branch") if r["kind"] == "eval" and r["step"] > 13), key=lambda r: r["val_loss"])
    assert checkpoint.load("branch/best.pt")["step"] == best["step"]


def test_a_job_that_always_resumes_begins_with_the_branch(tiny, command):
    train.train(tiny(out_dir="first", max_iters=20))
    call = ["--branch_from=first/ckpt.pt", "--max_iters=30", "--out_dir=b", "--resume"]
    assert command(train.main, *call)[0] == 0
    before = Path("b/ckpt.pt").read_bytes()
    status, out, _ = command(train.main, *call)
    assert status == 0 and "is finished" in out
    assert Path("b/ckpt.pt").read_bytes() == before


def test_a_study_of_branches_is_planned_as_it_is_run(tiny, forked, command):
    train.train(tiny(out_dir="first", max_iters=20, weight_decay=0.3))
    Path("study.py").write_text(
        "arms = {'a': '--branch_from=first/ckpt.pt --max_iters=30'}\ncontrol = 'a'\nseeds = [1337]"
    )
    for _ in range(2):  # the second finds the run that it has planned
        status, out, error = command(sweep.main, "study.py", "--out_dir=out", "--jobs=1")
        assert status == 0, out + error
    state = checkpoint.load("out/a/seed1337/ckpt.pt")
    assert (state["step"], state["config"]["weight_decay"]) == (30, 0.3)


def test_runs_of_a_study_that_branch_from_different_runs_are_different(tiny, forked, command, refuses):
    for name, beta1 in (("first", 0.9), ("second", 0.8)):
        train.train(tiny(out_dir=name, max_iters=20, beta1=beta1))

    def write(**steps):
        arms = {name: f"--branch_from={name}/ckpt.pt --beta1=0.9 --max_iters={n}" for name, n in steps.items()}
        Path("study.py").write_text(f"arms = {arms}\ncontrol = {next(iter(arms))!r}\nseeds = [1337]")

    write(first=30, second=30)
    assert command(sweep.main, "study.py", "--out_dir=out", "--jobs=1")[0] == 0
    losses = [read_json(f"out/{name}/seed1337/summary.json")["val_loss"] for name in ("first", "second")]
    assert losses[0] != losses[1]
    shutil.copytree("out/first", "other/second")
    refuses(sweep.main, "study.py", "--out_dir=other", words=["branch_from is first/ckpt.pt there and second/ckpt.pt"])
    write(first=10)
    refuses(sweep.main, "study.py", "--out_dir=new", words=["first/ckpt.pt is at step 20, after max_iters=10"])


def test_decays_of_a_study_branch_from_each_arm_s_and_seed_s_own_run(tiny, forked, command):
    size = write_study_files(
        TWO_ARMS
        + """
seeds = [1, 2]
settings = "--schedule=constant"
grid = {"max_iters": [20], "save_steps": [(12, 20)]}
"""
    )[1]
    assert command(sweep.main, "my_study.py", size, "--out_dir=trunk")[0] == 0
    Path("branches.py").write_text(
        TWO_ARMS
        + """
seeds = [1, 2]
settings = "--schedule=wsd"


def grid(size):
    trunk = "trunk/{arm},max_iters=20,save_steps=12,20/seed{seed}"
    return [dict(max_iters=n + 8, decay_iters=8, branch_from=f"{trunk}/step_0000{n}.pt") for n in (12, 20)]
"""
    )
    text = command(sweep.main, "branches.py", size, "--out_dir=out", "--dry_run")[1]
    assert f"# all: 8 runs, {8 * 8 * 128:,} tokens" in text, "the steps before a branch are the trunk's"
    assert command(sweep.main, "branches.py", size, "--out_dir=out")[0] == 0
    assert all(run.progress == 1 for run in planned("branches.py", size, "--out_dir=out")[0])
    for arm, options in {"baseline": {}, "reduced": dict(wq_identity=True, attn_scale=0.5)}.items():
        for n in (12, 20):
            train.train(tiny(out_dir=f"{arm}{n}", seed=2, **{**WSD, **options, "max_iters": n + 8}))
            assert_same_run(f"{arm}{n}", f"out/{arm},max_iters={n + 8}/seed2")


def test_what_happened_to_the_origin_later_is_no_part_of_a_branch(tiny):
    train.train(tiny(out_dir="first", max_iters=20, save_steps=(10,)))
    train.train(tiny(out_dir="first", max_iters=30, beta2=0.9, save_steps=(10,), resume=True))
    train.train(tiny(out_dir="branch", branch_from="first/step_000010.pt", max_iters=20, save_steps=(10,)))
    assert [(s["step"], s["changed"]) for s in read_json("branch/run.json")["segments"]] == [(0, {}), (10, {})]
    assert max(r["step"] for r in metrics("branch")) == 20


def test_the_best_of_a_branch_is_among_its_own_evaluations(tiny):
    train.train(tiny(out_dir="first", max_iters=20))
    train.train(tiny(out_dir="branch", branch_from="first/ckpt.pt", learning_rate=1.0))  # which spoils it
    losses = {r["step"]: r["val_loss"] for r in metrics("branch") if r["kind"] == "eval"}
    assert losses[40] > losses[20]
    assert checkpoint.load("branch/best.pt")["step"] == 20


@pytest.fixture
def first(tiny):
    """Makes options of a branch of a finished run in the folder first."""
    train.train(tiny(out_dir="first", max_iters=20))
    return lambda **changes: [f"--{name}={v}" for name, v in {"branch_from": "first/ckpt.pt", **changes}.items()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(out_dir="first"), ["first already contains a run", "--out_dir"]),
        (dict(out_dir="b", n_embd=32), ["first/ckpt.pt belongs to another run", "n_embd is 16 in the checkpoint"]),
        (dict(out_dir="b", data_seed=2), ["data_seed is 1337 in the checkpoint and 2 here"]),
        (dict(out_dir="b", max_iters=10), ["has 20 steps already, more than max_iters=10"]),
        (
            dict(out_dir="first", resume=True, branch_from="first/best.pt"),
            ["first holds a run that does not come from"],
        ),
        (dict(out_dir="b", init_from="first/ckpt.pt"), ["--init_from", "--branch_from", "give one"]),
        (dict(out_dir="b", branch_from="none.pt"), ["none.pt"]),
        (dict(out_dir="b", branch_from="weights.pt"), ["no run's options", "--init_from=weights.pt"]),
    ],
)
def test_what_cannot_be_a_branch_is_refused(first, refuses, changes, words):
    state = checkpoint.load("first/ckpt.pt")
    checkpoint.save("weights.pt", **{name: state[name] for name in checkpoint.OF_A_MODEL})
    before = {path.name: path.read_bytes() for path in Path("first").iterdir()}
    refuses(train.main, *first(**changes), words=words)
    assert before == {path.name: path.read_bytes() for path in Path("first").iterdir()}
    assert not Path("b").exists()


def test_a_branch_that_fails_at_its_start_leaves_nothing(first, monkeypatch, refuses):
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(train.runlog, "header", fail)
    refuses(train.main, *first(out_dir="out/b", max_iters=30), words=[])
    assert not Path("out").exists()


def test_options_changed_by_a_branch_are_told_and_those_of_a_call_are_not_taken_over(tiny, command):
    train.train(tiny(out_dir="first", max_iters=20, max_seconds=1e6))
    status, out, _ = command(
        train.main, "--branch_from=first/ckpt.pt", "--out_dir=b", "--max_iters=30", "--weight_decay=0.5"
    )
    assert status == 0
    assert "weight_decay is 0.1 in the checkpoint and 0.5 here" in out
    assert "branch_from" not in out.partition("changed since")[2].partition("\n")[0]
    config = json.loads(Path("b/config.json").read_text())
    assert (config["max_seconds"], config["resume"], config["branch_from"]) == (None, False, "first/ckpt.pt")
    assert checkpoint.load("b/ckpt.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
