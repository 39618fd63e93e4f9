"""Proposition 4.2: a change of gauge changes W_Q and W_K, but neither scores nor logits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ATTENTION_SKIP_ONLY, EXACT, SMALL, attention, conditioned, difference, normal, random_model

from theory import gauge, reparametrize
from theory.weights import OPTIONS_OF_HEADS, read_weights


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


OTHER_QUERIES = (
    {},
    {"query_residual": "linear"},
    {"query_residual": "mlp"},
    {"query_rotation": True},
    {"wq_identity_from": 1},
)
CHOICES = dict(
    n_head=st.sampled_from([1, 2, 4]),
    n_kv_head=st.sampled_from([None, 1, 2]),
    d_k=st.sampled_from([2, 4, 6]),
    n_layer=st.integers(1, 3),
    norm=st.sampled_from(["layernorm", "rmsnorm", "dyt", "none"]),
    pos=st.sampled_from(["learned", "rope", "none"]),
    bias=st.booleans(),
    parallel=st.booleans(),
    share_layers=st.booleans(),
    tie_weights=st.booleans(),
    causal=st.booleans(),
    n_expert=st.sampled_from([0, 2]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu"]),
    qk_norm=st.booleans(),
    attn_logit_std=st.sampled_from([None, None, 0.4]),
    query=st.sampled_from([{}, {}, *({"wq_identity": True, **query} for query in OTHER_QUERIES)]),
)


def chosen_model(choice, seed):
    """A model of these options, but for those that do not go with others."""
    choice = {**choice, **choice["query"]}
    del choice["query"]
    choice["n_embd"] = choice["n_head"] * choice.pop("d_k")
    if choice["n_head"] % (choice["n_kv_head"] or 1):
        choice["n_kv_head"] = None
    if choice["n_expert"] and choice["activation"] == "swiglu":
        choice["activation"] = "gelu"
    if choice["norm"] in ("dyt", "none"):
        choice["attn_logit_std"] = None
    if choice["n_layer"] == 1 or choice["share_layers"]:
        choice.pop("wq_identity_from", None)
    return random_model(seed=seed, cond=30, **dict(SMALL, **choice))


@settings(max_examples=40, deadline=None)
@given(choice=st.fixed_dictionaries(CHOICES), seed=st.integers(0, 99), rows=st.sampled_from(gauge.ROWS))
def test_d_k_rows_of_each_head_become_the_identity_in_any_model(choice, seed, rows):
    model = chosen_model(choice, seed)
    config = model.config
    found, conditions = gauge.identity_in_heads(model, rows)
    assert difference(model, found) < EXACT * max(1.0, max(conditions.values()) / 1e3)
    is_free = not (config.pos == "rope" or config.qk_norm or config.wq_identity)
    assert {name for _, name in conditions} == ({"q", "v"} if is_free else {"v"})
    assert found.config == config
    known = 0
    for number, block in enumerate(read_weights(found, OPTIONS_OF_HEADS).blocks):
        for name in "qv":
            if (number, name) in conditions:
                for head in gauge.split_heads(block[name].weight, config.kv_heads):
                    square = head[:, : config.d_k]
                    eye = torch.eye(config.d_k).double()
                    if rows == "top":
                        assert torch.equal(square[: config.d_k], eye)
                    else:
                        is_unit = (square[:, None] == eye).all(-1)  # (d, d_k)
                        assert is_unit.any(0).all()
                        assert square.abs().max() < 2 ** (config.d_k - 1) + 1e-9  # what pivoting guarantees
                    known += config.d_k**2
    if config.n_kv_head is None:
        assert known == len(conditions) * config.n_embd * config.d_k


@settings(max_examples=40, deadline=None)
@given(
    choice=st.fixed_dictionaries(CHOICES),
    seed=st.integers(0, 99),
    which=st.sampled_from("qkv"),
    name=st.sampled_from(gauge.GAUGES),
)
def test_a_change_of_gauge_keeps_the_logits_and_has_the_form_that_it_names(choice, seed, which, name):
    model = chosen_model(choice, seed)
    config = model.config
    if which != "v" and (config.wq_identity or config.qk_norm):
        with pytest.raises(ValueError, match="both identities and qk_norm False"):
            gauge.change_gauge(model, name, which)
        return
    found = gauge.change_gauge(model, name, which)
    assert difference(model, found) < EXACT
    assert found.config == config
    rotary = config.pos == "rope" and which != "v"
    both = (read_weights(m, OPTIONS_OF_HEADS).blocks for m in (model, found))
    for before, block in zip(*both, strict=True):
        shared = "v" if which == "v" else "k"
        many = block["o"].weight.T if which == "v" else block["q"].weight
        pair = (
            gauge.stack_groups(many, block[shared].weight, config.kv_heads),
            gauge.split_heads(block[shared].weight, config.kv_heads),
        )
        if rotary:
            lengths = [gauge.rotary_pairs(heads).norm(dim=1) for heads in pair]
            if name == "balanced":
                torch.testing.assert_close(*lengths)
            else:
                own = lengths["qk".index(which)]
                torch.testing.assert_close(own, own.mean().expand_as(own))
        else:
            grams = [heads.mT @ heads for heads in pair]
            if name == "balanced":
                torch.testing.assert_close(*grams, rtol=1e-8, atol=1e-8)
            else:
                own = grams[0] if which == "q" else grams[1]
                expected = torch.eye(config.d_k).double() * own[0, 0, 0]
                torch.testing.assert_close(own, expected.expand_as(own), rtol=1e-8, atol=1e-8)
        if name == "orthonormal" and not (which == "q" and config.kv_heads < config.n_head):
            torch.testing.assert_close(block[which].weight.norm(), before[which].weight.norm())


def test_chosen_rows_keep_the_entries_near_one_where_the_top_rows_do_not():
    model = random_model(cond=30, **dict(SMALL, norm="layernorm", n_embd=64, n_head=4))
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :16] *= 1e-3  # the coordinates of the top rows matter least
    largest = {}
    for rows in gauge.ROWS:
        found, conditions = gauge.identity_in_heads(model, rows)
        assert difference(model, found) < 1e-8
        values = [block[name].weight.abs().max() for block in read_weights(found).blocks for name in "qv"]
        largest[rows] = max(values).item(), max(conditions.values())
    assert largest["chosen"][0] < 8 < 1e3 < largest["top"][0]
    assert largest["chosen"][1] < largest["top"][1]


def test_rotary_checkpoints_that_differ_by_a_gauge_have_one_balanced_form():
    model = random_model(cond=30, **dict(SMALL, norm="rmsnorm", pos="rope"))
    elsewhere = copy.deepcopy(model)
    for i, block in enumerate(elsewhere.transformer.h):
        z = torch.complex(normal(4, 2, seed=i), normal(4, 2, seed=i + 9))
        weight = block.attn.c_attn.weight.data
        changed = gauge.apply_gauge(weight[:16].T, weight[16:32].T, gauge.commuting_gauge(z))
        weight[:32] = torch.cat(changed, dim=1).T
    assert difference(model, elsewhere) < EXACT
    forms = [gauge.change_gauge(m).state_dict() for m in (model, elsewhere)]
    for name, tensor in forms[0].items():
        torch.testing.assert_close(forms[1][name], tensor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("which", "qkv")
def test_the_orthonormal_gauge_conditions_the_projection_that_is_removed(which):
    model = random_model(cond=30, **ATTENTION_SKIP_ONLY)
    start = {"q": 0, "k": 16, "v": 32}[which]
    for seed, block in enumerate(model.transformer.h):
        rows = block.attn.c_attn.weight.data[start : start + 16].view(4, 4, 16)
        rows.copy_(torch.stack([conditioned(4, 1e4, torch.manual_seed(seed))] * 4) @ rows)
    better = gauge.change_gauge(model, "orthonormal", which)
    assert min(reparametrize.condition_numbers(model, which).values()) > 1e4
    assert max(reparametrize.condition_numbers(better, which).values()) <= 4**0.5 * 30 * (1 + 1e-9)
    assert difference(model, reparametrize.eliminate(better, which)) < EXACT


@pytest.mark.parametrize(
    ("changes", "is_singular", "words"),
    [
        (dict(wq_identity=True), False, ["wq_identity=True"]),
        (dict(), True, ["layer 1, head 2", "rank below 4"]),
        (dict(pos="rope"), True, ["layer 1, head 2", "rotary pairs"]),
    ],
)
def test_a_gauge_that_cannot_be_changed_is_refused(changes, is_singular, words):
    model = random_model(**dict(SMALL, **changes))
    if is_singular:
        rows = model.transformer.h[1].attn.c_attn.weight.data[8:12]
        rows.mul_(torch.tensor([1.0, 0, 1, 0])[:, None])
    for name in gauge.GAUGES:
        with pytest.raises(ValueError) as refusal:
            gauge.change_gauge(model, name)
        assert all(word in str(refusal.value) for word in words), refusal.value


def test_heads_without_freedom_are_refused():
    with pytest.raises(ValueError, match=r"wv_identity=True.*neither W_Q nor W_V"):
        gauge.identity_in_heads(random_model(**dict(SMALL, wv_identity=True, pos="rope")))
    with pytest.raises(ValueError, match="share_kv=False, got True"):
        gauge.identity_in_heads(random_model(**dict(SMALL, share_kv=True)))
    with pytest.raises(ValueError, match="W_V and W_O needs wv_identity=False"):
        gauge.change_gauge(random_model(**dict(SMALL, wv_identity=True)), which="v")
