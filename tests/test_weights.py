"""Reading a GPT's weights: every option and parameter is known, and others are refused by name."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from random_models import ATTENTION_SKIP_ONLY, SMALL, difference, random_model
from test_architectures import configs

from model import GPT, GPTConfig
from theory import gauge, reparametrize, trained_model, weights

TOKENS = torch.zeros(1, 10, dtype=torch.int64)
READERS = {
    "covering_result": reparametrize.covering_result,
    "read_weights": weights.read_weights,
    "eliminate": reparametrize.eliminate,
    "condition_numbers": reparametrize.condition_numbers,
    "change_gauge": gauge.change_gauge,
    "fit_keys": lambda model: trained_model.fit_keys(model, TOKENS),
    "measure": lambda model: trained_model.measure(model, (TOKENS, TOKENS), (TOKENS, TOKENS)),
    "without_queries": trained_model.without_queries,
}


@dataclass
class ExtendedConfig(GPTConfig):
    """A GPTConfig with an option that theory/ does not know."""

    qk_clip: bool = False


def extended(model, **changes):
    """The same GPT with an ExtendedConfig."""
    model.config = ExtendedConfig(**dataclasses.asdict(model.config), **changes)
    return model


def add_parameter(model):
    model.transformer.h[1].attn.q_norm = torch.nn.RMSNorm(4)


def add_buffer(model):
    model.transformer.h[1].attn.register_buffer("slopes", torch.ones(4), persistent=False)


def rename_parameter(model):
    model.transformer.h[1].mlp.c_gate = model.transformer.h[1].mlp.c_fc
    del model.transformer.h[1].mlp.c_fc


def widen_parameter(model):
    model.transformer.h[1].mlp.c_fc = torch.nn.Linear(16, 128, bias=False)


def refusal(function, model):
    with pytest.raises(ValueError) as refused:
        function(model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_shapes_are_those_of_every_architecture():
    for i, choice in enumerate(configs()):
        if i % 7 == 0:
            flags = dict(bias=i % 2 == 0, tie_weights=i % 3 == 0, wq_identity=i % 5 == 0)
            flags["wv_identity"] = choice["n_kv_head"] is None and i % 4 == 0
            flags["activation"] = "swiglu" if not choice["n_expert"] and i % 2 else "gelu"
            if flags["wq_identity"]:
                kinds = [{}, *({"query_residual": kind} for kind in ("linear", "mlp")), {"query_rotation": True}]
                flags |= [*kinds, {} if choice["share_layers"] else {"wq_identity_from": 1}][i // 5 % 5]
            with torch.device("meta"):
                model = GPT(GPTConfig(**choice, **flags))
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            assert weights.known_shapes(model.config, len(model.transformer.h)) == shapes
            weights.check_known(model, weights.OPTIONS_OF_HEADS)


@pytest.mark.parametrize("function", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_parameter, ["must know every parameter", "got transformer.h.1.attn.q_norm.weight", "theory/weights.py"]),
        (add_buffer, ["must know every parameter", "got transformer.h.1.attn.slopes", "theory/weights.py"]),
        (rename_parameter, ["got transformer.h.1.mlp.c_gate.weight"]),
        (widen_parameter, ["transformer.h.1.mlp.c_fc.weight of shape (64, 16)", "got one of shape (128, 16)"]),
        (lambda model: extended(model, qk_clip=True), ["got qk_clip=True, not at its default, False", "OPTIONS"]),
        (lambda model: extended(model), ["got qk_clip=False, at its default", "OPTIONS"]),
    ],
)
def test_a_parameter_or_an_option_that_is_not_known_is_refused_by_name(function, change, words):
    model = random_model(**ATTENTION_SKIP_ONLY)
    change(model)
    message = refusal(function, model)
    assert all(word in message for word in words), message


def test_no_result_covers_a_model_with_an_option_that_is_not_known(monkeypatch):
    model = random_model(**dict(SMALL, n_head=1, norm="layernorm"))
    assert reparametrize.covering_result(model) == "Proposition 4.1"
    assert "qk_clip=True" in refusal(reparametrize.covering_result, extended(model, qk_clip=True))
    monkeypatch.setitem(weights.OPTIONS, "qk_clip", (False, True))
    assert reparametrize.covering_result(model) == "Proposition 4.1"


@pytest.mark.parametrize(("option", "value"), [("pos", "alibi"), ("norm", "batchnorm"), ("activation", "geglu")])
def test_a_value_that_is_not_known_is_refused_by_name(option, value):
    model = random_model(**ATTENTION_SKIP_ONLY)
    setattr(model.config, option, value)
    for function in READERS.values():
        message = refusal(function, model)
        assert f"theory/ knows {option}=" in message
        assert f"got {value}" in message


@pytest.mark.parametrize(
    "changes",
    [
        dict(wq_identity=True, query_residual="linear", attn_scale=0.5),
        dict(wq_identity=True, query_residual="linear", attn_logit_std=0.4, norm="rmsnorm"),
        dict(attn_logit_std="paper", norm="layernorm"),
    ],
    ids=str,
)
def test_newer_options_that_are_older_ones_in_other_words(changes):
    model = random_model(**dict(SMALL, **changes))
    plain = weights.in_older_options(model)
    weights.check_known(plain)
    assert difference(model, plain) < 1e-12
    for other in (dict(share_kv=True), dict(wq_identity=True, query_residual="mlp")):
        with pytest.raises(ValueError, match="theory/ knows"):
            weights.check_known(weights.in_older_options(random_model(**dict(SMALL, **other))))
