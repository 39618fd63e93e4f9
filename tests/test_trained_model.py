"""Trained models and the theorems: the fit against brute force, models that it fits exactly, and both commands."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eliminate
import train
from engine import checkpoint
from model import GPT, GPTConfig
from theory import trained_model
from theory.weights import read_weights

SHAPE = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)


def random_model(seed=0, std=0.5, **changes):
    """A GPT with random weights, large enough for attention not to be uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def random_tokens(n=6, seed=1):
    return torch.randint(64, (n, 16), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(group=st.integers(1, 3), n_kv_head=st.integers(1, 2), d_k=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_fit_is_the_least_squares_of_all_logits(group, n_kv_head, d_k, seed):
    generator = np.random.default_rng(seed)
    d, n = group * n_kv_head * d_k, 40
    mixing = np.linalg.qr(generator.normal(size=(d, d)))[0] * generator.uniform(0.5, 2, d)  # well conditioned
    x = np.concatenate((generator.normal(size=(n, d)) @ mixing, np.ones((n, 1))), axis=1)
    w_q, w_k = generator.normal(size=(d + 1, d)), generator.normal(size=(d + 1, n_kv_head * d_k))
    keys, error = trained_model.best_keys(*map(torch.from_numpy, (w_q, w_k, x.T @ x)), n_kv_head)

    residual = size = 0.0
    for g in range(n_kv_head):
        own = slice(g * d_k, (g + 1) * d_k)
        heads = [slice(h * d_k, (h + 1) * d_k) for h in range(g * group, (g + 1) * group)]
        logits = np.concatenate([x @ w_q[:, h] @ (x @ w_k[:, own]).T for h in heads])  # (group·n, n)
        queries = np.concatenate([x[:, h] for h in heads])  # with W_Q = I
        # logits ≈ queries · (x W)ᵀ, one row of the system for each pair of tokens
        system = np.einsum("ia,jb->ijba", queries, x).reshape(group * n * n, -1)
        expected = np.linalg.lstsq(system, logits.ravel(), rcond=None)[0].reshape(d + 1, d_k)
        assert np.allclose(keys[:, own].numpy(), expected, rtol=1e-6, atol=1e-8)
        wrong = logits - queries @ (x @ expected).T
        residual += np.square(wrong - wrong.mean(axis=1, keepdims=True)).sum()
        size += np.square(logits - logits.mean(axis=1, keepdims=True)).sum()
    assert error == pytest.approx(np.sqrt(residual / size), abs=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=1), dict(share_layers=True), dict(parallel=True)], ids=str)
def test_a_model_whose_heads_read_their_own_coordinates_loses_nothing(changes):
    model = random_model(**changes).double()
    for block in model.transformer.h:
        q = block.attn.c_attn.weight[:16]
        first, second = q[:8, :8].clone(), q[8:, 8:].clone()
        with torch.no_grad():  # heads that share a key share the W_K, so they need the same W_Q in their coordinates
            q.copy_(torch.block_diag(first, first if "n_kv_head" in changes else second))
    windows = random_tokens(), random_tokens(seed=2)
    found = trained_model.measure(model, windows, windows)
    for layer in found["layers"]:
        assert layer.logit_error < 1e-9
        assert layer.loss_fitted == pytest.approx(found["loss"], abs=1e-9)
        assert abs(layer.loss_kept - found["loss"]) > 1e-6
        assert abs(layer.loss_uniform - found["loss"]) > 1e-6
    assert found["loss_fitted"] == pytest.approx(found["loss"], abs=1e-9)
    reduced = trained_model.without_queries(trained_model.fit_keys(model, windows[0]))
    assert torch.allclose(reduced(windows[0])[0], model(windows[0])[0], atol=1e-8)
    assert model.num_params().total - reduced.num_params().total == 16**2 * len(model.transformer.h)


@pytest.mark.parametrize("bias", [False, True])
def test_a_general_model_is_not_fitted_exactly_and_is_not_changed(bias):
    model = random_model(bias=bias)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = random_tokens(), random_tokens(seed=2)
    found = trained_model.measure(model, windows, windows)
    for number, layer in enumerate(found["layers"]):
        assert 0.01 < layer.logit_error < 1
        values = np.linalg.svd(read_weights(model).blocks[number]["q"].weight.numpy(), compute_uv=False)
        assert layer.singular_values == pytest.approx(values)
        assert layer.cond == pytest.approx(np.linalg.cond(read_weights(model).blocks[number]["q"].weight.numpy()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = torch.nn.functional.cross_entropy(model(*windows)[0].flatten(0, 1), windows[1].flatten())
    assert found["loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("norm", ["none", "layernorm", "rmsnorm", "dyt"])
def test_the_distances_from_the_assumptions(norm):
    model, x = random_model(norm=norm), random_tokens()
    seen = {}
    block = model.transformer.h[1]
    block.ln_1.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], n=output))
    block.attn.register_forward_hook(lambda _, inputs, output: seen.update(attn=output))
    block.mlp.register_forward_hook(lambda _, inputs, output: seen.update(mlp=output))
    model(x)
    stream, n, attn, mlp = (seen[name].detach().double().flatten(0, 1).numpy() for name in ("x", "n", "attn", "mlp"))
    layer = trained_model.measure(model, (x, x), (x, x))["layers"][1]
    linear = np.linalg.lstsq(stream, n, rcond=None)[0]
    expected = np.linalg.norm(n - stream @ linear) / np.linalg.norm(n)
    assert layer.norm_from_linear == pytest.approx(expected, abs=1e-4)
    assert (layer.norm_from_linear < 1e-4) == (norm == "none")
    assert layer.skip_over_attention == pytest.approx(np.linalg.norm(stream) / np.linalg.norm(attn), rel=1e-4)
    assert layer.skip_over_mlp == pytest.approx(np.linalg.norm(stream + attn) / np.linalg.norm(mlp), rel=1e-4)


def validation_loss(cfg, path):
    return train.train(dataclasses.replace(cfg, init_from=str(path), eval_only=True, out_dir="out/none"))["val_loss"]


@pytest.mark.parametrize("changes", [dict(bias=True), dict(causal=False, objective="mlm")], ids=str)
def test_the_commands_on_a_trained_model(tiny, command, changes):
    cfg = tiny(out_dir="out/run", max_iters=60, eval_interval=1000, eval_windows=1000, log_interval=100, **changes)
    train.train(cfg)
    status, out, error = command(trained_model.main, "--ckpt=out/run/ckpt.pt", "--windows=31", "--out_dir=out/report")
    assert status == 0, error
    found = json.loads(Path("out/report/layers.json").read_text())
    assert found["loss"] == pytest.approx(validation_loss(cfg, "out/run/ckpt.pt"), abs=1e-5)  # all 31 windows
    assert len(found["layers"]) == 2
    assert f"loss {found['loss']:.4f} nats per target" in out
    assert f"{found['layers'][1]['loss_fitted'] - found['loss']:+.4f}" in Path("out/report/report.md").read_text()
    assert Path("out/report/spectra.png").stat().st_size > 10_000

    arguments = "--ckpt=out/run/ckpt.pt", "--out=out/fitted/ckpt.pt", "--approximate", "--windows=31"
    status, out, error = command(eliminate.main, *arguments)
    assert status == 0, error
    assert "not exact" in out
    after = checkpoint.load("out/fitted/ckpt.pt")["eliminated"]["real"]["float32"]["loss_after"]
    assert after == pytest.approx(found["loss_fitted"], abs=1e-5)
    reduced = dataclasses.replace(cfg, wq_identity=True)
    assert validation_loss(reduced, "out/fitted/ckpt.pt") == pytest.approx(after, abs=1e-5)


def test_a_checkpoint_that_does_not_name_its_data(tiny, command, refuses):
    cfg = tiny(out_dir="out/run", max_iters=2)
    train.train(cfg)
    state = checkpoint.load("out/run/ckpt.pt")
    names = "block_size vocab_size n_layer n_head n_embd dropout bias".split()
    arguments = {name: state["model_config"][name] for name in names}
    torch.save({"model": state["model"], "model_args": arguments, "iter_num": 7}, "theirs.pt")
    refuses(trained_model.main, "--ckpt=theirs.pt", words=["does not name its dataset", "--dataset="])
    status, out, error = command(trained_model.main, "--ckpt=theirs.pt", "--dataset=tiny", "--windows=3")
    assert status == 0, error
    assert "theirs.pt, step 7: loss " in out
    assert "on 3 validation windows" in out


@pytest.mark.parametrize(
    ("main", "changes", "arguments", "words"),
    [
        (trained_model.main, dict(wq_identity=True), [], ["wq_identity must be False", "baseline"]),
        (trained_model.main, dict(pos="rope"), [], ["pos=rope", "pos=learned"]),
        (trained_model.main, {}, ["--windows=0"], ["windows"]),
        (trained_model.main, {}, ["--ckpt=none.pt"], ["there is no checkpoint none.pt"]),
        (eliminate.main, {}, ["--approximate", "--which=k", "--out=out/new/ckpt.pt"], ["approximate", "which"]),
        (
            eliminate.main,
            {},
            ["--approximate", "--windows=none", "--out=out/new/ckpt.pt"],
            ["windows must be a number", "256", "got none"],
        ),
        (eliminate.main, dict(pos="rope"), ["--approximate", "--out=out/new/ckpt.pt"], ["pos=rope"]),
    ],
)
def test_mistakes_end_in_one_line(tiny, refuses, main, changes, arguments, words):
    train.train(tiny(out_dir="out/run", max_iters=1, **changes))
    refuses(main, "--ckpt=out/run/ckpt.pt", *arguments, words=words)
    assert not Path("out/new").exists()
