"""Section 4.1.1: where a loss with weight decay is stationary, the two matrices of a head are in balance."""

import pytest
import torch
from random_models import SMALL, random_model

from model import GPT
from theory import balance, gauge
from theory.weights import read_weights


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_decay_is_stationary_under_changes_of_gauge_where_the_heads_are_in_balance(n_kv_head):
    model = random_model(cond=30, **dict(SMALL, norm="layernorm", n_kv_head=n_kv_head))
    eye = torch.eye(4).double().repeat(n_kv_head, 1, 1)

    def decay(block, pair, change):
        many, shared = (
            (block["o"].weight.T, block["v"].weight) if pair == "vo" else (block["q"].weight, block["k"].weight)
        )
        return sum(matrix.square().sum() for matrix in gauge.apply_gauge(many, shared, change))

    for which, pair in (("q", "qk"), ("v", "vo")):
        in_balance = gauge.change_gauge(model, "balanced", which)
        for gpt, stationary in ((model, False), (in_balance, True)):
            block = read_weights(gpt).blocks[0]
            change = eye.clone().requires_grad_()
            decay(block, pair, change).backward()
            assert (change.grad.abs().max() < 1e-8) == stationary == bool(balance.imbalance(gpt, pair)[0].max() < 1e-9)
        for seed in range(5):  # the least decay of all gauges
            other = eye + 0.3 * torch.randn(eye.shape, generator=torch.Generator().manual_seed(seed)).double()
            assert decay(block, pair, other) > decay(block, pair, eye)


@pytest.mark.parametrize(("n_kv_head", "decay"), [(4, 0.0), (2, 1.0)])
def test_gradient_descent_on_a_loss_keeps_the_imbalance_and_decay_alone_takes_it_away(n_kv_head, decay):
    # In the limit of small steps d/dt (W_QᵀW_Q − W_KᵀW_K) = −2·decay·(W_QᵀW_Q − W_KᵀW_K), whatever the loss and norms.
    model = random_model(cond=30, **dict(SMALL, norm="layernorm", n_layer=1, n_kv_head=n_kv_head))
    idx = torch.randint(23, (4, 10), generator=torch.Generator().manual_seed(1))
    rate, n_steps = 2e-3, 150

    def grams():
        """Those of W_Q and W_Oᵀ, and those of W_K and W_V, (2, n_kv_head, d_k, d_k) each."""
        block = read_weights(model).blocks[0]
        pairs = (block["q"].weight, block["k"].weight), (block["o"].weight.T, block["v"].weight)
        many = torch.stack([gauge.stack_groups(*pair, n_kv_head) for pair in pairs])
        shared = torch.stack([gauge.split_heads(pair[1], n_kv_head) for pair in pairs])
        return many.mT @ many, shared.mT @ shared

    before = grams()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
    after, kept = grams(), (1 - rate * decay) ** (2 * n_steps)
    off = (after[0] - after[1] - kept * (before[0] - before[1])).flatten(1).norm(dim=1)
    moved = (after[0] - kept * before[0]).flatten(1).norm(dim=1)  # by the loss
    assert (off < 1e-3 * moved).all()


@pytest.mark.parametrize("which", "qv")
def test_the_balanced_gauge_is_in_balance_and_the_identity_is_not(which):
    model = random_model(cond=30, **dict(SMALL, norm="rmsnorm"))
    pair = {"q": "qk", "v": "vo"}[which]
    assert balance.imbalance(gauge.change_gauge(model, "balanced", which), pair).max() < 1e-9
    assert balance.imbalance(model, pair).min() > 1e-3


def test_the_command_has_a_row_for_each_checkpoint(tiny, command):
    import train

    cfg = tiny(max_iters=4, save_steps=(2,), eval_interval=10)
    train.train(cfg)
    status, out, _ = command(balance.main, f"--run={cfg.out_dir}")
    assert status == 0
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["0", "2", "4"]
    torch.manual_seed(cfg.seed)
    initial = balance.imbalance(GPT(cfg.model_config()), "qk")
    assert rows[0][1].strip() == f"{initial.mean():.3f}"
    assert command(balance.main, "--run=out/none")[0] == 2
