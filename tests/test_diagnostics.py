"""Diagnostics: against plain numpy, and a run that they leave as it is."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

import train
from engine import checkpoint, diagnostics, run_files, wandb_mirror
from model import GPT, GPTConfig

SHAPE = dict(block_size=8, vocab_size=32, n_layer=3, n_head=4, n_embd=16)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(wq_identity=True, attn_scale=0.5),
        dict(n_kv_head=2, causal=False, bias=True),
        dict(share_layers=True, pos="rope", dropout=0.3),
        dict(wk_identity=True, norm="none", parallel=True),
    ],
    ids=str,
)
def test_numbers_are_those_of_plain_numpy(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, y = torch.randint(32, (2, 3, 8))
    inputs = []
    handles = [b.attn.register_forward_hook(lambda _, args, out: inputs.append(args[0])) for b in model.transformer.h]
    state = torch.get_rng_state()
    found = diagnostics.measure(model, x, y, contextlib.nullcontext())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for handle in handles:
        handle.remove()

    assert all(len(values) == 3 for values in found.values())
    for layer, number in enumerate(model.order):
        attn = model.transformer.h[number].attn
        with torch.no_grad():
            q, k, _ = (t.numpy() for t in attn.project(inputs[layer]))
        entropies, spreads, logits = [], [], []
        for b, h, t in np.ndindex(3, 4, 8):
            keys = k[b, h // (4 // k.shape[1])]
            seen = keys[: t + 1] if model.config.causal else keys
            row = seen @ q[b, h, t] * model.config.attn_scale / 2  # √d_k = 2
            p = np.exp(row - row.max())
            p /= p.sum()
            entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
            spreads.append(row.std())
            logits.extend(np.abs(row))
        assert found["attn_entropy"][layer] == pytest.approx(np.mean(entropies), rel=1e-4)
        assert found["attn_logit_std"][layer] == pytest.approx(np.mean(spreads), rel=1e-4)
        assert found["attn_logit_mean"][layer] == pytest.approx(np.mean(logits), rel=1e-4)
        assert found["attn_logit_max"][layer] == pytest.approx(np.max(logits), rel=1e-4)
        assert found["query_norm"][layer] == pytest.approx(np.linalg.norm(q, axis=-1).mean(), rel=1e-4)
        assert found["key_norm"][layer] == pytest.approx(np.linalg.norm(k, axis=-1).mean(), rel=1e-4)

    model.eval()
    attn = model.transformer.h[0].attn
    gradients = torch.autograd.grad(model(x, y)[1], list(attn.parameters()))
    assert found["grad_norm"][0] == pytest.approx(sum(g.square().sum() for g in gradients).sqrt().item(), rel=1e-4)
    rows = (part for part in attn.c_attn.weight.detach().split(attn.widths) if len(part))
    for name, identity in (("W_Q_norm", model.config.wq_identity), ("W_K_norm", model.config.wk_identity)):
        assert found[name][0] == (None if identity else pytest.approx(next(rows).norm().item()))


def test_a_run_with_diagnostics_is_the_same_run(tiny):
    cfg = tiny(out_dir="with", diagnostics=True, dropout=0.1)
    with_them = train.train(cfg)
    without = train.train(dataclasses.replace(cfg, out_dir="without", diagnostics=False))
    assert with_them["val_loss"] == without["val_loss"]
    weights, expected = (checkpoint.load(f"{folder}/ckpt.pt")["model"] for folder in ("with", "without"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    records = [record for record in run_files.read_metrics("with") if record["kind"] == "diagnostics"]
    assert [record["step"] for record in records] == [0, 10, 20, 30, 40]
    assert all(len(record["attn_entropy"]) == cfg.n_layer for record in records)
    assert not any(record["kind"] == "diagnostics" for record in run_files.read_metrics("without"))


def test_diagnostics_of_a_bfloat16_run_that_recomputes_are_those_of_float32(tiny):
    train.train(tiny(out_dir="plain", diagnostics=True, max_iters=10))
    train.train(tiny(out_dir="recomputed", diagnostics=True, max_iters=10, recompute=True))
    train.train(tiny(out_dir="bfloat16", diagnostics=True, max_iters=10, recompute=True, dtype="bfloat16"))
    plain, recomputed, rounded = (
        [record for record in run_files.read_metrics(folder) if record["kind"] == "diagnostics"]
        for folder in ("plain", "recomputed", "bfloat16")
    )
    for name, values in plain[-1].items():
        if name not in ("step", "kind"):
            assert recomputed[-1][name] == pytest.approx(values, rel=1e-4)
            assert rounded[-1][name] == pytest.approx(values, rel=0.1)
            assert rounded[0][name] == pytest.approx(plain[0][name], rel=0.02)


def test_a_list_reaches_wandb_as_numbers():
    assert wandb_mirror._flat("diagnostics", {"W_Q_norm": [1.0, None], "loss": 2.0}) == {
        "diagnostics/W_Q_norm/0": 1.0,
        "diagnostics/loss": 2.0,
    }
