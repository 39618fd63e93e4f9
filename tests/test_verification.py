"""Is a rewriting exact? True ones stay far below the bound of rounding, and what is not exact is above it."""

import copy
import itertools
import math

import pytest
import torch
from random_models import ATTENTION_SKIP_ONLY, SMALL, random_model

from model import GPT, GPTConfig, SelfAttention
from theory import gauge, reparametrize
from theory.verification import LARGEST_BOUND, largest_difference, rounding_bound

# What each result covers: options of the model, the projection that is removed, and from which layer.
COVERED = {
    "Theorem 4.1": (dict(mlp_skip=False), "q", None),
    "Theorem 4.1, untied": (dict(mlp_skip=False, tie_weights=False, bias=True), "v", None),
    "Theorem 4.1, rotary": (dict(attn_skip=False, pos="rope", n_kv_head=2), "q", None),
    "Theorem 4.1, parallel": (dict(parallel=True, attn_skip=False, mlp_skip=False, pos="none"), "k", None),
    "Theorem 4.2": (dict(share_layers=True, causal=False), "q", None),
    "Lemma 8.4": (dict(n_expert=3), "q", 1),
    "Proposition 4.1": (dict(n_head=1, norm="layernorm"), "q", None),
    "Proposition 4.1, keys": (dict(n_head=1, norm="rmsnorm", bias=True), "k", None),
    "Remark 1": (dict(n_head=1, norm="dyt", pos="rope"), "v", None),
}
INVERTING = [name for name in COVERED if name.startswith(reparametrize.BY_CHANGE_OF_BASIS)]
IN_QUERIES = [name for name, (_, which, _) in COVERED.items() if which == "q"]


def initial_model(seed, **choice):
    """A GPT as it is before training, in float64: attention is nearly uniform, so changes of it are hardly seen."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**choice)).double().eval()


def rewritten(model, which, layer, form="kept"):
    """model without its projection, and the condition numbers of what was inverted for that."""
    start = model if form == "kept" else gauge.change_gauge(model, form)
    conditions = []
    if reparametrize.covering_result(start, which, layer) in reparametrize.BY_CHANGE_OF_BASIS:
        conditions = list(reparametrize.condition_numbers(start, which, layer).values())
    return reparametrize.eliminate(start, which, layer), conditions


def over_bound(model, other, conditions):
    """The difference between the logits of two models, divided by the bound."""
    x = torch.randint(23, (8, 10), generator=torch.Generator().manual_seed(0))
    return largest_difference(model, other, x) / rounding_bound(model, x, conditions)


def models(name):
    """Three random models for an entry of COVERED, from well to badly conditioned, and one before its training."""
    choice = {**SMALL, **COVERED[name][0]}
    random_models = [random_model(seed, cond, **choice) for seed, cond in enumerate((1.5, 1e3, 5e5))]
    return [*random_models, initial_model(7, **choice)]


def heads(attention, x):
    return x.unflatten(-1, (-1, attention.d_k)).transpose(1, 2)  # (B, n_head, T, d_k)


def add_input_to_queries(attention, x, q, k, v):
    return q + heads(attention, x), k, v


def add_a_little_input_to_queries(attention, x, q, k, v):
    return q + 0.01 * heads(attention, x), k, v


def add_input_to_keys(attention, x, q, k, v):
    return q, k + heads(attention, x)[:, : k.size(1)], v


def normalise_queries(attention, x, q, k, v):
    return torch.nn.functional.rms_norm(q, (attention.d_k,)), k, v


def divide_keys_by_the_length_of_the_input(attention, x, q, k, v):
    return q, k / x.square().mean(-1).sqrt()[:, None, :, None], v


def double_the_scale(attention, x, q, k, v):
    return 2 * q, k, v


def soften_values(attention, x, q, k, v):
    return q, k, v.tanh()


def change_attention(monkeypatch, change):
    """Let model.py have another attention: change maps (attention, x, q, k, v) to new q, k, v."""
    project = SelfAttention.project
    monkeypatch.setattr(SelfAttention, "project", lambda self, x, p=None: change(self, x, *project(self, x, p)))


@pytest.mark.parametrize("name", COVERED)
def test_exact_rewritings_stay_far_below_the_bound(name):
    _, which, layer = COVERED[name]
    for model in models(name):
        for form in ("kept", "balanced", "orthonormal") if which == "q" and model.config.pos != "rope" else ("kept",):
            assert over_bound(model, *rewritten(model, which, layer, form)) < 1 / 4, (model.config, form)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *itertools.product([add_input_to_queries, add_a_little_input_to_queries, add_input_to_keys], IN_QUERIES),
        *itertools.product([divide_keys_by_the_length_of_the_input], INVERTING),
        (normalise_queries, "Proposition 4.1, keys"),
        (soften_values, "Remark 1"),
    ],
)
def test_another_attention_in_the_code_is_seen(monkeypatch, change, name):
    _, which, layer = COVERED[name]
    change_attention(monkeypatch, change)
    for model in models(name):
        assert over_bound(model, *rewritten(model, which, layer)) > 2, model.config


@pytest.mark.parametrize("change", [double_the_scale, normalise_queries, soften_values])
def test_a_change_of_the_code_that_the_theorem_allows_is_allowed(monkeypatch, change):
    """Theorem 4.1 is about the residual stream: what is done to queries, keys and values within a head is free."""
    change_attention(monkeypatch, change)
    for model in models("Theorem 4.1"):
        assert over_bound(model, *rewritten(model, "q", None)) < 1 / 4


def scale_the_output(attention):
    attention.c_proj.weight.data *= 1.001


def change_the_scale(attention):
    attention.scale *= 1.001


def drop_the_biases(attention):
    attention.c_attn.bias.data.zero_()


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        *itertools.product([scale_the_output, change_the_scale], COVERED),
        *((drop_the_biases, name) for name, (choice, *_) in COVERED.items() if "bias" in choice),
    ],
)
def test_a_wrong_rewriting_is_seen(spoil, name):
    _, which, layer = COVERED[name]
    for model in models(name)[:3]:
        other, conditions = rewritten(model, which, layer)
        spoil(other.transformer.h[-1].attn)
        assert over_bound(model, other, conditions) > 2, model.config


def test_the_bound_never_exceeds_a_millionth_and_nan_is_over_it():
    model = random_model(**ATTENTION_SKIP_ONLY)
    x = torch.zeros(1, 10, dtype=torch.int64)
    assert rounding_bound(model, x, [1e3]) == pytest.approx(rounding_bound(model, x, [1e2]) * 10)
    assert rounding_bound(model, x, [1e14]) == LARGEST_BOUND
    broken = copy.deepcopy(model)
    broken.transformer.h[2].mlp.c_fc.weight.data[0, 0] = math.nan
    assert math.isnan(largest_difference(model, broken, x.expand(4, -1)))
