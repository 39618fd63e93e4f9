"""Orthogonal changes of basis pass through norms: the logits stay, and W_Q of one layer becomes triangular."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import EXACT, SMALL, difference, random_model

from theory import orthogonal
from theory.weights import read_weights

CHOICES = dict(
    norm=st.sampled_from(["layernorm", "rmsnorm", "none"]),
    pos=st.sampled_from(["learned", "rope", "none"]),
    n_kv_head=st.sampled_from([None, 2]),
    attn_skip=st.booleans(),
    parallel=st.booleans(),
    share_layers=st.booleans(),
    tie_weights=st.booleans(),
    causal=st.booleans(),
    n_expert=st.sampled_from([0, 2]),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    activation=st.sampled_from(["gelu", "relu_squared"]),
)


def without_shifts_before(model, names):
    for name, parameter in model.named_parameters():
        if ".ln_" in name and name.endswith("bias") and any(part in name for part in names):
            parameter.data.zero_()
    return model


@settings(max_examples=40, deadline=None)
@given(choice=st.fixed_dictionaries(CHOICES), seed=st.integers(0, 99), unit=st.booleans())
def test_w_q_becomes_triangular_through_norms_and_the_logits_stay(choice, seed, unit):
    choice = {**choice, "mlp_skip": choice["attn_skip"] or not choice["parallel"]}
    model = random_model(seed=seed, cond=30, **dict(SMALL, **choice))
    routers = ["ln_1", "ln_2"] if choice["n_expert"] else []  # which have no bias, nor has the LM head
    without_shifts_before(model, ["ln_f", *routers])
    if unit and choice["norm"] != "none":
        model.transformer.ln_f.weight.data.fill_(1)
    layer = len(model.transformer.h) - 1
    found = orthogonal.triangular_query(model, layer)
    assert difference(model, found) < EXACT
    w_q = read_weights(found).blocks[layer]["q"].weight
    assert torch.equal(w_q, w_q.triu())
    assert (w_q.diagonal() > -1e-12).all()  # without a mean a stream has d − 1 directions, and the last entry is 0
    keeps = choice["norm"] == "none" or unit
    assert found.config.tie_weights == (choice["tie_weights"] and keeps)
    assert found.config.norm == ("none" if choice["norm"] == "none" else "rmsnorm")


def test_an_orthogonal_w_q_becomes_the_identity():
    model = random_model(cond=1.0, **dict(SMALL, norm="rmsnorm"))
    for block in model.transformer.h:
        block.ln_1.weight.data.fill_(1)
    found = orthogonal.triangular_query(model, 1)
    w_q = read_weights(found).blocks[1]["q"].weight
    torch.testing.assert_close(w_q, 2 * torch.eye(16).double(), rtol=0, atol=1e-9)  # `conditioned` has the length 2
    assert difference(model, found) < EXACT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(norm="dyt"), "norm=dyt"),
        (dict(norm="rmsnorm", wq_identity=True), "wq_identity=True"),
        (dict(norm="layernorm", bias=True), "the norm before the LM head has a shift"),
    ],
    ids=str,
)
def test_models_that_no_other_basis_describes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        orthogonal.triangular_query(random_model(**dict(SMALL, **changes)), 0)
    with pytest.raises(ValueError, match="below 3, got 3"):
        orthogonal.triangular_query(random_model(**dict(SMALL, norm="rmsnorm")), 3)
