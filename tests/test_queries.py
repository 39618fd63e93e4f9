"""What may take W_Q's place: each kind of queries is its formula, decodes with a cache, and shares initial weights."""

import dataclasses
import math

import pytest
import torch
from test_model import randomise
from torch.nn import functional as F

from engine.decode import generate
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=12, vocab_size=29, n_layer=2, n_head=4, n_embd=16, wq_identity=True)
TRAINED = dict(wq_identity=False)
QUERIES = {
    "trained": TRAINED,
    "identity": {},
    "linear": dict(query_residual="linear"),
    "mlp": dict(query_residual="mlp"),
    "rotation": dict(query_rotation=True),
}
OTHERS = [
    dict(wq_identity_from=1),
    dict(share_kv=True),
    dict(share_kv=True, **TRAINED),
    dict(share_kv=True, pos="rope", n_kv_head=2),
    dict(qk_norm=True),
    dict(qk_norm=True, pos="rope", **TRAINED),
    dict(qk_norm=True, share_kv=True, query_residual="mlp"),
]
EVERY = [*QUERIES.values(), *OTHERS]


def built(changes, **more):
    return GPT(dataclasses.replace(SMALL, **{**changes, **more}))


def expected_queries(kind, attention, x):
    """(B, T, n_embd) by the formula."""
    if kind in ("trained", "linear"):
        product = x @ attention.c_attn.weight[:16].T + attention.c_attn.bias[:16]
        return product if kind == "trained" else x + product
    if kind == "mlp":
        normalised = attention.residual_rmsnorm_input.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = F.gelu(normalised @ attention.residual_in.weight.T + attention.residual_in.bias)
        y = hidden @ attention.residual_out.weight.T + attention.residual_out.bias
        norm = attention.residual_layernorm_output
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x + norm.weight * y + norm.bias
    return x @ attention.rotation.double() if kind == "rotation" else x


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("kind", QUERIES)
def test_attention_is_the_formula(kind, share_kv, qk_norm):
    torch.manual_seed(0)
    gpt = built(QUERIES[kind], share_kv=share_kv, qk_norm=qk_norm, bias=True, attn_scale=0.7)
    attention = randomise(gpt).double().transformer.h[1].attn
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    first = 16 if kind in ("trained", "linear") else 0
    products = x @ attention.c_attn.weight[first:].T + attention.c_attn.bias[first:]
    keys, values = (products, products) if share_kv else products.chunk(2, dim=-1)
    heads = []
    for part in torch.arange(16).split(4):
        q, k, v = expected_queries(kind, attention, x)[..., part], keys[..., part], values[..., part]
        if qk_norm:
            q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        logits = (0.7 / 2 * q @ k.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        heads.append(logits.softmax(-1) @ v)
    expected = torch.cat(heads, -1) @ attention.c_proj.weight.T + attention.c_proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_layers_before_wq_identity_from_train_a_query_matrix():
    gpt = built(dict(wq_identity_from=1))
    assert [len(block.attn.c_attn.weight) for block in gpt.transformer.h] == [48, 32]
    baseline, reduced = built(TRAINED).num_params().total, built({}).num_params().total
    assert baseline - 256 == gpt.num_params().total == reduced + 256


def test_the_parameters_are_those_of_the_papers():
    def size(**changes):
        with torch.device("meta"):  # nothing is drawn
            return GPT(GPTConfig(**changes)).num_params()

    sizes = {kind: size(**{"wq_identity": True, **changes}) for kind, changes in QUERIES.items()}
    layer = {kind: (size.attn_mlp - sizes["identity"].attn_mlp) / 12 for kind, size in sizes.items()}
    d = 768
    assert layer == dict(trained=d * d, identity=0, linear=d * d, mlp=d * d + 2 * d, rotation=0)
    assert (size().total - size(share_kv=True).total) / 12 == d * d


def test_rotations_are_orthogonal_fixed_and_one_for_each_layer():
    gpt, again = built(dict(query_rotation=True)), built(dict(query_rotation=True))
    other = built(dict(query_rotation=2))
    first, second = (block.attn.rotation.double() for block in gpt.transformer.h)
    for rotation in (first, second):
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(16).double(), rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 0.1
    assert torch.equal(again.transformer.h[0].attn.rotation.double(), first)
    assert (other.transformer.h[0].attn.rotation - first).abs().max() > 0.1
    assert not any("rotation" in name for name in gpt.state_dict())


@pytest.mark.parametrize("changes", EVERY, ids=str)
def test_decoding_with_the_cache_is_decoding_without(changes):
    torch.manual_seed(1)
    gpt = randomise(built(changes)).double()
    idx = torch.randint(29, (2, 3))
    tokens, expected = generate(gpt, idx, 12, temperature=0), idx
    for _ in range(12):
        expected = torch.cat((expected, gpt(expected[:, -12:])[0].argmax(-1)), 1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("changes", EVERY, ids=str)
def test_initial_weights_are_the_baseline_s_wherever_names_are(changes):
    models = []
    for config in (changes, TRAINED):
        torch.manual_seed(7)
        models.append(built(config))
    found, baseline = (dict(model.named_parameters()) for model in models)
    for name in found.keys() & baseline.keys():
        if "c_attn" in name and found[name].shape != baseline[name].shape:
            attention = models[0].get_submodule(name.removesuffix(".c_attn.weight"))
            parts, expected = attention.split_qkv(found[name], 0), baseline[name].split(16)
            pairs = [pair for pair in zip(parts, expected, strict=True) if pair[0].shape == pair[1].shape]
            assert pairs or "n_kv_head" in changes
            assert all(torch.equal(*pair) for pair in pairs), name
        else:
            assert torch.equal(found[name], baseline[name]), name


NORMED = dict(block_size=64, vocab_size=512, n_layer=2, n_head=4)


def measured_std(gpt, layer):
    """The standard deviation of the logits of different positions, over several new models' worth of heads."""
    seen = []
    attention = gpt.transformer.h[layer].attn
    attention.register_forward_hook(lambda module, inputs, _: seen.append(module.project(inputs[0])))
    with torch.no_grad():
        gpt(torch.randint(512, (8, 64)))
    q, k, _ = seen[0]
    logits = attention.scale * q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT
    return logits[..., ~torch.eye(64, dtype=torch.bool)].square().mean().sqrt().item()


@pytest.mark.parametrize(
    "changes",
    [
        *QUERIES.values(),
        dict(wq_identity_from=1),
        dict(qk_norm=True),
        dict(n_kv_head=2),
        dict(wk_identity=True, **TRAINED),
    ],
    ids=str,
)
def test_attn_logit_std_is_what_new_models_have(changes):
    shape = {**NORMED, "wq_identity": True, "attn_scale": 0.5, **changes}
    for n_embd in (64, 256):
        squares = {}
        for wanted in (0.3, "paper", "small"):
            config = GPTConfig(**shape, n_embd=n_embd, attn_logit_std=wanted)
            for seed in range(3):
                torch.manual_seed(seed)
                gpt = GPT(config)
                for layer in range(2):
                    squares.setdefault((wanted, layer), []).append(measured_std(gpt, layer) ** 2)
        for (wanted, layer), values in squares.items():
            expected = {
                0.3: 0.3,
                "paper": 0.5 * GPTConfig(**shape).unscaled_logit_std(layer, 768),
                "small": 1.0 if config.qk_norm else 0.2 if config.query(layer) == "trained" else 0.6,
            }
            assert math.sqrt(sum(values) / 3) == pytest.approx(expected[wanted], rel=0.05)


def test_the_newer_activations_are_their_formulas():
    torch.manual_seed(2)
    x = torch.randn(3, 16, dtype=torch.float64)
    for name in ("relu_squared", "swiglu"):
        mlp = randomise(built({}, activation=name, bias=True)).double().transformer.h[0].mlp
        hidden = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
        if name == "swiglu":
            hidden = hidden[:, :64] / (1 + (-hidden[:, :64]).exp()) * hidden[:, 64:]
        else:
            hidden = torch.where(hidden > 0, hidden**2, 0.0)
        torch.testing.assert_close(mlp(x), hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias, rtol=1e-10, atol=1e-10)
    gated, plain = GPTConfig(activation="swiglu", mlp_ratio=8 / 3), GPTConfig()
    assert GPT(gated).num_params() == GPT(plain).num_params()
    with pytest.raises(ValueError, match="activation=swiglu is that of a plain MLP, got n_expert=2"):
        dataclasses.replace(SMALL, activation="swiglu", n_expert=2)


def test_the_paper_s_scales_at_another_width():
    for d, reduced, baseline in ((768, 0.5, 1.0), (128, math.sqrt(1.5), 6.0)):
        size = dict(n_embd=d, n_head=4, attn_logit_std="paper")
        assert GPTConfig(wq_identity=True, attn_scale=0.5, **size).attn_scale_in(0) == pytest.approx(reduced)
        assert GPTConfig(**size).attn_scale_in(0) == pytest.approx(baseline)
    paper = GPTConfig(wq_identity=True, attn_scale=0.5), GPTConfig()
    stds = [config.attn_scale * config.unscaled_logit_std(0, 768) for config in paper]
    assert stds == [pytest.approx(0.277, abs=5e-4), pytest.approx(0.307, abs=5e-4)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(query_residual="mlp", **TRAINED), "query_residual=mlp is a choice beside W_Q = I: set wq_identity=True"),
        (dict(query_rotation=True, **TRAINED), "query_rotation=True is a choice"),
        (dict(wq_identity_from=1, **TRAINED), "wq_identity_from=1 is a choice"),
        (dict(query_residual="gelu"), "query_residual must be linear, mlp or none, got 'gelu'"),
        (dict(query_residual="mlp", query_rotation=3), "set one of the two"),
        (dict(wq_identity_from=2), "wq_identity_from=2 must be below n_layer=2"),
        (dict(wq_identity_from=1, share_layers=True), "0 with share_layers=True"),
        (dict(query_rotation=-1), "query_rotation must be zero or positive, got -1"),
        (dict(share_kv=True, wv_identity=True), "set neither wk_identity nor wv_identity"),
        (dict(attn_logit_std=0.0), "attn_logit_std must be positive, paper, small or none, got 0.0"),
        (dict(attn_logit_std="papers"), "attn_logit_std must be positive, paper, small or none, got papers"),
        (dict(attn_logit_std=0.3, norm="dyt"), "attn_logit_std needs norm=layernorm or rmsnorm, got norm=dyt"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        dataclasses.replace(SMALL, **changes)
    assert words in str(refusal.value)
