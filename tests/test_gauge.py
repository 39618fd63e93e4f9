"""Proposition 4.2: a change of gauge changes W_Q and W_K, but neither scores nor logits."""

import copy

import pytest
import torch
from random_models import ATTENTION_SKIP_ONLY, EXACT, SMALL, attention, conditioned, difference, normal, random_model

from theory import gauge, reparametrize
from theory.weights import read_weights


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_proposition_4_2_a_block_diagonal_matrix_moves_between_w_q_and_w_k(n_kv_head):
    x, w_q, w_k = normal(9, 16), normal(16, 16, seed=1), normal(16, 4 * n_kv_head, seed=2)
    w_v, blocks = normal(16, 4 * n_kv_head, seed=3), normal(n_kv_head, 4, 4, seed=4)
    changed_q, changed_k = gauge.apply_gauge(w_q, w_k, blocks)
    expected = attention(x, w_q, w_k, w_v, n_head=4)
    torch.testing.assert_close(attention(x, changed_q, changed_k, w_v, 4), expected, rtol=1e-10, atol=1e-10)
    if n_kv_head == 4:
        d = torch.block_diag(*blocks)
        torch.testing.assert_close(changed_q, w_q @ d)
        torch.testing.assert_close(changed_k, w_k @ torch.linalg.inv(d.T))


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_proposition_4_2_balanced_heads_have_equal_gram_matrices_and_one_form(n_kv_head):
    choice = dict(SMALL, norm="layernorm", n_kv_head=n_kv_head, bias=True)
    model = random_model(cond=30, **choice)
    balanced = gauge.change_gauge(model)
    assert difference(model, balanced) < EXACT
    for block in read_weights(balanced).blocks:
        q = gauge.stack_groups(block["q"].weight, block["k"].weight, n_kv_head)
        k = gauge.split_heads(block["k"].weight, n_kv_head)
        torch.testing.assert_close(q.mT @ q, k.mT @ k, rtol=1e-9, atol=1e-9)

    elsewhere = copy.deepcopy(model)  # the same function with other weights
    for i, block in enumerate(elsewhere.transformer.h):
        weight, d = block.attn.c_attn.weight.data, 16
        blocks = normal(n_kv_head, 4, 4, seed=i)
        for rows in (weight, block.attn.c_attn.bias.data[:, None]):
            q, k = gauge.apply_gauge(rows[:d].T, rows[d : d + 4 * n_kv_head].T, blocks)
            rows[: d + 4 * n_kv_head] = torch.cat((q, k), dim=1).T
    first, second = model.state_dict(), elsewhere.state_dict()
    assert max((first[name] - second[name]).abs().max().item() for name in first) > 0.1
    other = gauge.change_gauge(elsewhere).state_dict()
    for name, tensor in balanced.state_dict().items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-8)


def test_proposition_4_2_an_orthonormal_gauge_conditions_w_q_nearly_as_well_as_any():
    model = random_model(cond=30, **ATTENTION_SKIP_ONLY)
    for seed, block in enumerate(model.transformer.h):
        weight, blocks = block.attn.c_attn.weight.data, torch.stack([conditioned(4, 1e4, torch.manual_seed(seed))] * 4)
        weight[:32] = torch.cat(gauge.apply_gauge(weight[:16].T, weight[16:32].T, blocks), dim=1).T
    worse, better = model, gauge.change_gauge(model, "orthonormal")
    assert min(reparametrize.condition_numbers(worse).values()) > 1e4
    assert max(reparametrize.condition_numbers(better).values()) <= 4**0.5 * 30 * (1 + 1e-9)
    assert difference(worse, better) < EXACT
    assert difference(worse, reparametrize.eliminate(better)) < EXACT


@pytest.mark.parametrize(
    ("changes", "is_singular", "words"),
    [
        (dict(pos="rope"), False, ["pos=rope", "commute"]),
        (dict(wq_identity=True), False, ["wq_identity"]),
        (dict(), True, ["layer 1, head 2", "rank below d_k=4"]),
    ],
)
def test_a_gauge_that_cannot_be_changed_is_refused(changes, is_singular, words):
    model = random_model(**SMALL, **changes)
    if is_singular:
        model.transformer.h[1].attn.c_attn.weight.data[8] = model.transformer.h[1].attn.c_attn.weight.data[9]
    for name in gauge.GAUGES:
        with pytest.raises(ValueError) as refusal:
            gauge.change_gauge(model, name)
        assert all(word in str(refusal.value) for word in words), refusal.value
