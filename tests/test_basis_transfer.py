"""Section 5.1's experiment: its targets, its baseline, its training, and what it reports."""

import itertools
import json
import math
import os
import signal
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from engine import checkpoint
from model import ACTIVATIONS
from theory import basis_transfer as bt
from theory import basis_transfer_report
from theory import basis_transfer_target as targets

SMALL = dict(
    h=(12,), seeds=(0,), steps=60, batch=32, linear_samples=5000, test_samples=500, dtype="float32", device="cpu"
)
QUICK = Path(bt.configurator.ROOT) / "config/basis_transfer_quick.py"
activations = st.sampled_from(typing.get_args(configurator.field_types(bt.BasisTransferConfig)["activation"]))
seeds = st.integers(0, 2**31)


@pytest.fixture
def small(tmp_path):
    """Makes BasisTransferConfigs for experiments of about a second."""
    return lambda **overrides: bt.BasisTransferConfig(**{**SMALL, "out_dir": str(tmp_path / "out"), **overrides})


@pytest.fixture
def no_figures(monkeypatch):
    """Do not draw figures, which takes longer than the small runs."""
    monkeypatch.setattr(basis_transfer_report, "draw", lambda *_: None)


def without_time(results):
    return [{name: value for name, value in result.items() if name != "train_seconds"} for result in results]


@settings(max_examples=20)
@given(seed=seeds, h=st.integers(2, 24), activation=activations)
def test_the_papers_target_is_equation_4(seed, h, activation):
    W1, W2, L = (matrix.double() for matrix in targets.make_target("paper", h, seed))
    assert W1.shape == (4 * h, h)
    assert W2.shape == (h, 4 * h)
    sigma, x = ACTIVATIONS[activation](), torch.randn(5, h, dtype=torch.float64)
    Z = L + torch.eye(h)
    want = torch.stack([W2 @ sigma(W1 @ v) + Z @ v - v for v in x])
    torch.testing.assert_close(targets.Target(W1, W2, L)(x, sigma), want)


def test_the_papers_matrices_are_gaussian_with_its_normalisation():
    W1, W2, L = targets.make_target("paper", 100, 0)
    for matrix, variance in ((W1, 1 / 400), (W2, 1 / 400), (L + torch.eye(100), 1 / 100)):
        values = matrix.flatten() / math.sqrt(variance)
        n = len(values)
        assert abs(values.mean()) < 4 / math.sqrt(n)
        assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
        assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert not torch.equal(W1, targets.make_target("paper", 100, 1).W1)


KINDS = ("identity", "orthogonal", "gaussian", "gaussian:1", "gaussian:30")


@settings(max_examples=30)
@given(seed=seeds, h=st.integers(2, 16), first=st.sampled_from(KINDS), second=st.sampled_from((*KINDS, "same")))
def test_other_targets_are_the_composition_of_equation_3(seed, h, first, second):
    W1, W2, _ = (m.double() for m in targets.make_target("identity/identity", h, seed))
    target = targets.Target(*(m.double() for m in targets.make_target(f"{first}/{second}", h, seed)))
    # Recover the two bases from the MLP that they have changed.
    omega_1, inverse = target.W2 @ torch.linalg.pinv(W2), torch.linalg.pinv(W1) @ target.W1
    omega_2 = torch.linalg.inv(inverse)
    x, relu = torch.randn(7, h, dtype=torch.float64), torch.relu
    u = torch.linalg.solve(omega_2, x.T)
    composed = omega_1 @ (W2 @ relu(W1 @ u) + u)
    got = target(x, relu).T
    accuracy = 1e-5 * max(1, torch.linalg.cond(omega_2).item() * torch.linalg.cond(omega_1).item())
    assert (got - composed).norm() <= accuracy * composed.norm()
    if second == "same":
        assert (target.linear - torch.eye(h)).abs().max() < accuracy
        second = first
    for kind, omega in ((first, omega_1), (second, omega_2)):
        values = torch.linalg.svdvals(omega)
        assert values.square().mean().item() == pytest.approx(1, rel=accuracy)
        wanted = {"identity": 1, "orthogonal": 1, "gaussian:1": 1, "gaussian:30": 30}.get(kind)
        if wanted:
            assert (values[0] / values[-1]).item() == pytest.approx(wanted, rel=10 * accuracy)
        assert (kind == "identity") == bool((omega - torch.eye(h)).abs().max() < 1e-3)


@settings(max_examples=30)
@given(seed=seeds, h=st.integers(1, 10), n=st.integers(1, 60), ridge=st.sampled_from((1e-6, 0.3)), data=st.data())
def test_the_linear_baseline_is_numpys_least_squares(seed, h, n, ridge, data):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(2, n, h)).astype(np.float32)
    fit = bt.LinearFit(h)
    start = 0
    while start < n:  # in chunks of random sizes
        stop = start + data.draw(st.integers(1, n - start))
        fit.add(torch.from_numpy(x[start:stop]), torch.from_numpy(y[start:stop]))
        start = stop
    # Ridge regression is least squares with the rows of √λ·I as h additional inputs whose outputs are 0.
    more = np.concatenate((x, math.sqrt(ridge) * np.eye(h))), np.concatenate((y, np.zeros((h, h))))
    want = np.linalg.lstsq(*more, rcond=None)[0].T
    np.testing.assert_allclose(fit.solve(ridge).numpy(), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert fit.samples == n


def test_the_linear_baseline_at_h_256_has_the_papers_9_to_10_percent(small, no_figures):
    cfg = small(h=(256,), seeds=(0, 1, 2), steps=0, linear_samples=20_000, test_samples=1000)
    results = bt.run_all(cfg)
    errors, cosines = ([result["linear"][m]["mean"] for result in results] for m in basis_transfer_report.MEASURES)
    assert 0.09 < np.mean(errors) < 0.103
    assert np.mean(cosines) == pytest.approx(0.995, abs=5e-4)
    assert "model" not in results[0]
    (row,) = Path(cfg.out_dir, "table.md").read_text().splitlines()[3:4]
    assert row.count("| – ") == 4  # no number for a model that was not trained
    assert f"{100 * np.mean(errors):.2f} ± {100 * np.std(errors, ddof=1):.2f} %" in row


@settings(max_examples=6)
@given(seed=seeds, activation=activations, name=st.sampled_from(("paper", "gaussian/orthogonal")))
def test_a_width_of_6h_represents_every_target(seed, activation, name):
    cfg = bt.BasisTransferConfig(**{**SMALL, "width_ratio": 6.0, "activation": activation, "linear_samples": 100})
    run = bt.TransferRun(cfg, name, 12, seed)
    W1, W2, L = run.target
    eye = torch.eye(12)
    run.mlp.c_fc.weight.data = torch.cat((W1, eye, -eye))
    run.mlp.c_proj.weight.data = torch.cat((W2, L - eye, eye - L), dim=1)
    list(run.fit_linear())
    run.evaluate()
    assert run.result["model"]["error"]["mean"] < 1e-4
    assert run.result["model"]["cosine"]["mean"] > 1 - 1e-7
    assert run.relative_squared_error(run.inputs("test", 0, 50)) < 1e-8


def test_a_step_is_adamw_with_clipping_and_a_cosine(small):
    """Against AdamW written out, on the gradient of equation (5)'s loss written out, in float64."""
    cfg = small(steps=8, learning_rate=0.02, grad_clip=0.05)
    run = bt.TransferRun(cfg, "paper", 12, 3)
    W = [p.detach().double().requires_grad_() for p in (run.mlp.c_fc.weight, run.mlp.c_proj.weight)]
    target = targets.Target(*(m.double() for m in run.target))
    m, v = ([torch.zeros_like(w) for w in W] for _ in range(2))
    clipped = 0
    for step in range(cfg.steps):
        x = run.inputs("train", step, cfg.batch).double()
        y = target(x, torch.nn.functional.gelu)
        difference = torch.nn.functional.gelu(x @ W[0].T) @ W[1].T + x - y
        loss = (difference.norm(dim=1) ** 2 / y.norm(dim=1) ** 2).mean()
        gradients = torch.autograd.grad(loss, W)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        clipped += bool(norm > cfg.grad_clip)
        rate = 0.01 * (1 + math.cos(math.pi * step / 8))
        with torch.no_grad():
            for i, g in enumerate(gradients):
                g = g * min(1, cfg.grad_clip / norm)
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                direction = m[i] / (1 - 0.9 ** (step + 1)) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                W[i] -= rate * (0.1 * W[i] + direction)
        run.update()
    assert clipped
    for ours, w in zip((run.mlp.c_fc.weight, run.mlp.c_proj.weight), W, strict=True):
        assert (ours - w).norm() < 1e-4 * w.norm()


def test_bfloat16_trains_as_float32_does(small, no_figures):
    exact, rounded = (bt.run_all(small(dtype=d, out_dir=small().out_dir + d))[0] for d in ("float32", "bfloat16"))
    assert rounded["dtype"] == "bfloat16"
    assert exact["curve"] != rounded["curve"]
    for measure in basis_transfer_report.MEASURES:
        assert rounded["model"][measure]["mean"] == pytest.approx(exact["model"][measure]["mean"], rel=0.02)


def test_a_compiled_loss_is_the_same(small, monkeypatch):
    compiled = []

    def record(function, compile_=torch.compile):
        compiled.append(function)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", record)
    plain = bt.TransferRun(small(), "paper", 12, 0)  # on a CPU
    assert not compiled
    run = bt.TransferRun(small(compile=True), "paper", 12, 0)
    assert len(compiled) == 1
    x = run.inputs("train", 0, 32)
    assert run.loss(x).item() == pytest.approx(plain.loss(x).item(), rel=1e-6)


def test_a_killed_experiment_ends_with_the_same_numbers(small, monkeypatch, no_figures):
    options = dict(seeds=(0, 1), targets=("paper", "gaussian:5/same"), linear_samples=9000, steps=220)
    whole = bt.run_all(small(**options, out_dir=small().out_dir + "-whole"))
    clock, calls, saves = [0.0], [0], []

    def time_passes():  # each call takes two seconds
        clock[0] += 2
        return clock[0]

    def kill_sometimes(function):
        def wrapped(run, *arguments):
            calls[0] += 1
            if calls[0] in (1, 31, 77, 120, 522):
                raise RuntimeError("killed")
            return function(run, *arguments)

        return wrapped

    def save(run, original=bt.TransferRun.save):
        saves.append(clock[0])
        original(run)

    monkeypatch.setattr(bt.time, "perf_counter", time_passes)
    monkeypatch.setattr(bt.TransferRun, "update", kill_sometimes(bt.TransferRun.update))
    monkeypatch.setattr(bt.LinearFit, "add", kill_sometimes(bt.LinearFit.add))
    monkeypatch.setattr(bt.TransferRun, "save", save)
    kills = 0
    while True:
        try:
            resumed = bt.run_all(small(**options, resume=True))
            break
        except RuntimeError:
            kills += 1
            saves.append(clock[0])  # a kill loses what came after the last save or the start of the process
    assert kills == 5
    assert without_time(resumed) == without_time(whole)
    assert max(b - a for a, b in itertools.pairwise(saves)) < 60
    assert resumed[0]["seed"] != resumed[1]["seed"]
    assert calls[0] > 4 * 220  # all four runs were trained here


def test_ctrl_c_keeps_the_last_step_and_says_how_to_continue(monkeypatch, command, tmp_path, no_figures):
    arguments = [f"--out_dir={tmp_path / 'out'}", "--h=12", "--seeds=0", "--steps=60", "--batch=32"]
    arguments += ["--linear_samples=5000", "--test_samples=500"]

    def interrupt(run, original=bt.TransferRun.update):
        original(run)
        if run.step == 25:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(bt.TransferRun, "update", interrupt)
        status, out, _ = command(bt.main, *arguments)
    assert status == 130
    assert "stopped at step 25" in out
    assert "--resume" in out
    (path,) = (tmp_path / "out").glob("*.pt")
    assert checkpoint.load(path, required=())["step"] == 25
    status, out, _ = command(bt.main, *arguments, "--resume")
    assert status == 0
    assert "step 60/60" in out
    # Finished runs are read, not trained again; a seed can be added.
    monkeypatch.setattr(bt.TransferRun, "update", None)
    monkeypatch.setattr(bt.TransferRun, "evaluate", None)
    assert command(bt.main, *arguments, "--resume")[0] == 0
    with pytest.raises(TypeError):
        bt.main([*arguments, "--seeds=0,1", "--resume"])


def test_the_quick_experiment_beats_the_best_linear_map_and_reports_what_it_measured(command, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []

    def record(self, values, original=Axes.hist, **style):
        drawn.append(values)
        return original(self, values, **style)

    monkeypatch.setattr(Axes, "hist", record)
    smaller = ["--h=16", "--seeds=0,1", "--steps=600", "--batch=128", "--linear_samples=20000", "--learning_rate=0.03"]
    status, out, _ = command(bt.main, QUICK, *smaller, f"--out_dir={tmp_path}")
    assert status == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["steps"] == 600
    runs = content["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        assert run["linear"]["error"]["mean"] > 1.2 * run["model"]["error"]["mean"]
        assert run["linear"]["cosine"]["mean"] < run["model"]["cosine"]["mean"]
        assert run["curve"][-1][0] == run["steps"] == 600
        # The last steps of training see inputs of the same distribution.
        assert run["curve"][-1][1] == pytest.approx(run["model"]["error"]["mean"], rel=0.2)
        quantiles = list(run["model"]["error"]["quantiles"].values())
        assert quantiles == sorted(quantiles)
    # The numbers of the table are those of the JSON file.
    table = (tmp_path / "table.md").read_text()
    assert out.count(table.splitlines()[3]) == 1
    ratios = [run["linear"]["error"]["mean"] / run["model"]["error"]["mean"] for run in runs]
    assert f"{np.mean(ratios):.2f} ± {np.std(ratios, ddof=1):.2f}" in table
    assert "| 600 × 128 |" in table
    assert "trained 600 steps × 128 inputs (the paper: 20,000 × 65,536); learning_rate=0.03" in table
    # The figures show every held-out input of both seeds: errors of the model and of the linear map, then cosines.
    drawn = drawn[-4:]
    assert [len(values) for values in drawn] == 4 * [2 * 32_768]
    means = [
        np.mean([run[method][m]["mean"] for run in runs])
        for m in basis_transfer_report.MEASURES
        for method in basis_transfer_report.METHODS
    ]
    assert [values.mean() for values in drawn] == pytest.approx(means * np.array([100, 100, 1, 1]))
    for name in ("figure1.png", "figure2.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@settings(max_examples=30)
@given(seed=seeds, h=st.integers(1, 9), n=st.integers(1, 20))
def test_errors_and_cosines(seed, h, n):
    y, z = np.random.default_rng(seed).normal(size=(2, n, h))
    got = basis_transfer_report.errors_and_cosines(torch.from_numpy(z), torch.from_numpy(y))
    for i in range(n):
        assert got["error"][i].item() == pytest.approx(math.dist(y[i], z[i]) / math.hypot(*y[i]))
        assert got["cosine"][i].item() == pytest.approx(y[i] @ z[i] / math.hypot(*y[i]) / math.hypot(*z[i]))
    values = basis_transfer_report.statistics(got["error"])
    assert values["mean"] == pytest.approx(got["error"].numpy().mean())
    assert values["quantiles"]["0.95"] == pytest.approx(np.quantile(got["error"].numpy(), 0.95))


def test_a_training_that_diverges_stops(command, tmp_path):
    arguments = ["--h=8", "--seeds=0", "--steps=50", "--batch=8", "--linear_samples=100", f"--out_dir={tmp_path}"]
    status, _, error = command(bt.main, *arguments, "--learning_rate=1e30")
    assert status == 1
    assert "smaller learning_rate" in error


def test_mistakes_end_in_one_line(refuses, small, tmp_path, no_figures):
    refuses(bt.main, "--targets=papers", words=["targets", "'papers'", "orthogonal"])
    for name in ("orthogonal", "gaussian:0.5/same", "orthogonal:3/identity", "same/same", "gaussian:x/identity"):
        refuses(bt.main, f"--targets={name}", words=["targets", name])
    refuses(bt.main, "--h=1", words=["h must be 2 or more"])
    refuses(bt.main, "--h=10", "--width_ratio=0.25", words=["width_ratio=0.25", "h=10"])
    refuses(bt.main, "--seeds=", words=["seeds"])
    refuses(bt.main, "--seeds=1,1", words=["seeds must be different values"])
    refuses(bt.main, "--seeds=-1", words=["seeds must be zero or positive"])
    refuses(bt.main, "--batch=0", words=["batch must be positive"])
    refuses(bt.main, "--ridge=-1", words=["ridge"])
    refuses(bt.main, "--device=cpu", "--dtype=tf32", f"--out_dir={tmp_path / 'none'}", words=["tf32", "CUDA"])
    assert not (tmp_path / "none").exists()
    cfg = small(steps=2)
    bt.run_all(cfg)
    again = ["--h=12", "--seeds=0", "--steps=2", "--batch=32", "--device=cpu", f"--out_dir={cfg.out_dir}"]
    refuses(bt.main, *again, words=["already contains runs", "--resume"])
    refuses(bt.main, *again, "--resume", words=["linear_samples", "5000", "other options"])
    (path,) = Path(cfg.out_dir).glob("*.pt")
    checkpoint.save(path, model={})
    refuses(bt.main, *again, "--resume", words=[path, "not a checkpoint of this experiment"])
