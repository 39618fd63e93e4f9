import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import configurator
from engine.attention import LONGEST, attend, attend_by_products
from model import GPT, GPTConfig, ParamCount
from train import TrainConfig

CONFIG = Path(__file__).resolve().parents[1] / "config"
SMALL = GPTConfig(block_size=24, vocab_size=97, n_layer=3, n_head=4, n_embd=32)


def randomise(model):
    """Give every parameter, biases and LayerNorm weights included, a random value of ordinary size."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.15)
    return model.eval()


def with_identity_query(reduced):
    """The same weights in a model that has W_Q, whose query block is I."""
    config = reduced.config
    full = GPT(dataclasses.replace(config, wq_identity=False))
    state = dict(reduced.state_dict())
    for layer in range(len(reduced.transformer.h)):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        state[name] = torch.cat((torch.eye(config.n_embd), state[name]))
        if config.bias:
            name = name.replace("weight", "bias")
            state[name] = torch.cat((torch.zeros(config.n_embd), state[name]))
    full.load_state_dict(state)
    return full.eval()


def to_hugging_face(model):
    """A transformers.GPT2LMHeadModel with the weights of a model that has W_Q and biases."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}[config.activation],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=config.tie_weights,
        )
    ).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        # Theirs are Conv1D layers, which store (in, out).
        is_linear = name.startswith("transformer.h.") and tensor.dim() == 2
        state[name] = tensor.T if is_linear else tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith((".attn.bias", ".masked_bias"))]
    return theirs


@pytest.mark.parametrize(
    ("name", "total", "attn_mlp"),
    [
        ("baseline_tied", 124_373_760, 84_934_656),
        ("reduced_tied", 117_295_872, 77_856_768),
        ("baseline_untied", 163_007_232, 84_934_656),
        ("reduced_untied", 155_929_344, 77_856_768),
        ("reduced_tied_mlp4p5", 124_373_760, 84_934_656),
        ("baseline_tied_mlp3p5", 117_295_872, 77_856_768),
    ],
)
def test_the_paper_s_models_have_the_paper_s_parameters(name, total, attn_mlp):
    cfg = configurator.parse(TrainConfig, [str(CONFIG / f"{name}.py")])
    with torch.device("meta"):
        assert GPT(cfg.model_config()).num_params() == ParamCount(total, attn_mlp)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_logits_equal_those_of_hugging_face(tie_weights, activation):
    torch.manual_seed(0)
    model = randomise(GPT(dataclasses.replace(SMALL, bias=True, tie_weights=tie_weights, activation=activation)))
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        expected = to_hugging_face(model)(idx).logits
        logits, loss = model(idx, idx)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.flatten()))


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("attn_scale", [0.5, 1.0, 1.7])
def test_reduced_logits_equal_hugging_face_with_a_scaled_identity_query(tie_weights, attn_scale):
    torch.manual_seed(1)
    config = dataclasses.replace(SMALL, bias=True, tie_weights=tie_weights, wq_identity=True, attn_scale=attn_scale)
    reduced = randomise(GPT(config))
    theirs = to_hugging_face(with_identity_query(reduced))
    for block in theirs.transformer.h:  # theirs knows no scale but 1/√d_k: it goes into the query block
        with torch.no_grad():
            block.attn.c_attn.weight[:, : config.n_embd] *= attn_scale
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        logits, _ = reduced(idx, idx)
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(
    n_head=st.integers(1, 4),
    d_k=st.integers(1, 12),
    n_layer=st.integers(1, 3),
    T=st.integers(1, 12),
    attn_scale=st.sampled_from([0.25, 0.5, 1.0, 3.0]),
    bias=st.booleans(),
    tie_weights=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_identity_is_the_baseline_with_its_query_block_set_to_the_identity(
    n_head, d_k, n_layer, T, attn_scale, bias, tie_weights, seed
):
    torch.manual_seed(seed)
    config = GPTConfig(
        block_size=12,
        vocab_size=31,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * d_k,
        bias=bias,
        tie_weights=tie_weights,
        wq_identity=True,
        attn_scale=attn_scale,
    )
    reduced = randomise(GPT(config))
    full = with_identity_query(reduced)
    attention_inputs = {}

    def record(model):
        def attention(q, k, v, **options):
            attention_inputs.setdefault(model, []).append((q, k, v, options))
            return original(q, k, v, **options)

        return attention

    original = F.scaled_dot_product_attention
    idx = torch.randint(31, (2, T))
    logits = {}
    for name, model in (("reduced", reduced), ("full", full)):
        F.scaled_dot_product_attention = record(name)
        try:
            with torch.no_grad():
                logits[name], _ = model(idx, idx)
        finally:
            F.scaled_dot_product_attention = original
    # A product with I in float32 is exact. Later layers follow from the same attention, computed by the same kernel.
    q, k, v, options = attention_inputs["reduced"][0]
    full_q, full_k, full_v, full_options = attention_inputs["full"][0]
    assert torch.equal(q, full_q)
    torch.testing.assert_close((k, v), (full_k, full_v), rtol=1e-6, atol=1e-6)
    assert options == full_options
    assert options["scale"] == pytest.approx(attn_scale / d_k**0.5)
    torch.testing.assert_close(logits["reduced"], logits["full"], rtol=1e-5, atol=1e-5)
    assert full.num_params().total - reduced.num_params().total == n_layer * (config.n_embd**2 + bias * config.n_embd)


def test_no_position_sees_a_later_one():
    torch.manual_seed(2)
    model = randomise(GPT(dataclasses.replace(SMALL, wq_identity=True)))
    idx = torch.randint(97, (1, 24))
    changed = idx.clone()
    changed[0, 15] = (idx[0, 15] + 1) % 97
    with torch.no_grad():
        before, after = model(idx, idx)[0], model(changed, changed)[0]
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


def test_targets_of_minus_one_do_not_count():
    torch.manual_seed(3)
    model = GPT(SMALL).eval()
    idx, targets = torch.randint(97, (2, 2, 24))
    ignored = targets.clone()
    ignored[:, ::2] = -1
    _, each = model(idx, targets, reduction="none")
    _, mean = model(idx, ignored)
    torch.testing.assert_close(mean, each.view(2, 24)[:, 1::2].mean())


def test_without_targets_only_the_last_logits_come():
    model = GPT(SMALL).eval()
    idx = torch.randint(97, (2, 10))
    logits, loss = model(idx)
    assert logits.shape == (2, 1, 97)
    assert loss is None
    torch.testing.assert_close(logits[:, 0], model(idx, idx)[0][:, -1])


SHAPES = dict(
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([2, 4]),
    n_kv_head=st.sampled_from([None, 1, 2]),
    wq_identity=st.booleans(),
    tie_weights=st.booleans(),
    pos=st.sampled_from(["learned", "rope", "none"]),
    norm=st.sampled_from(["layernorm", "rmsnorm", "dyt"]),
    mlp_ratio=st.sampled_from([2.0, 4.0]),
    n_expert=st.sampled_from([0, 2]),
)


@settings(max_examples=30, deadline=None)
@given(first=st.fixed_dictionaries(SHAPES), second=st.fixed_dictionaries(SHAPES), seed=st.integers(0, 2**62))
def test_models_of_one_seed_share_every_matrix_that_both_have(first, second, seed):
    models = []
    for shape in (first, second):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(**{**vars(SMALL), **shape})))
    named = [dict(model.named_parameters()) for model in models]
    for name in named[0].keys() & named[1].keys():
        parts = [parameter.split([len(parameter)]) for parameter in (named[0][name], named[1][name])]
        if "c_attn" in name:
            attention = name.removesuffix(".c_attn.weight")
            parts = [m.get_submodule(attention).split_qkv(m.get_parameter(name), 0) for m in models]
        for one, other in zip(*parts, strict=True):
            smaller = first["n_layer"] != second["n_layer"] and name.endswith("c_proj.weight")
            if one.shape == other.shape and not smaller:
                assert torch.equal(one, other), name


def test_no_two_initial_matrices_are_the_same():
    model = GPT(SMALL)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    values = torch.cat([part.flatten() for matrix in matrices for part in matrix.split(16)])
    assert len(values.unique()) > 0.99 * len(values)


def test_initialisation_is_gpt_2_s():
    torch.manual_seed(4)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, vocab_size=512, bias=True))
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float("ln_" in name and "weight" in name)))
        else:
            std = 0.02 / (2 * 2) ** 0.5 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(n_embd=100, n_head=12), ["n_embd=100", "n_head=12", "96 or 108"]),
        (dict(mlp_ratio=4.3), ["mlp_ratio=4.3", "n_embd=768"]),
        (dict(n_layer=0), ["n_layer must be positive, got 0"]),
        (dict(mlp_ratio=float("nan")), ["mlp_ratio must be positive, got nan"]),
        (dict(attn_scale=-1.0), ["attn_scale must be zero or positive, got -1.0"]),
        (dict(attn_scale=float("inf")), ["attn_scale must be zero or positive, got inf"]),
        (dict(load_balance=-1.0), ["load_balance must be zero or positive, got -1.0"]),
        (dict(n_expert=-1), ["n_expert must be zero or positive, got -1"]),
        (dict(dropout=1.0), ["dropout"]),
        (dict(activation="swish"), ["activation", "gelu"]),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(changes, words):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**changes)
    assert all(word in str(refusal.value) for word in words)


def test_a_sequence_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match="block_size=24"):
        GPT(SMALL)(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.parametrize(
    ("T", "training", "by_products"),
    [(8, True, True), (8, False, False), (LONGEST, True, True), (LONGEST + 1, True, False)],
)
def test_attention_on_a_cpu_is_two_products_where_short_sequences_train(monkeypatch, T, training, by_products):
    seen, function = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append(q)
        return function(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    # With W_Q = I and autocast the queries are in float32, keys and values in bfloat16.
    q, k, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        y = attend(q, k.bfloat16(), v.bfloat16(), is_causal=True, scale=0.3)
    assert y.dtype == torch.bfloat16 and bool(seen) != by_products
    expected = function(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)
    if training:
        found, exact = (torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (y, expected))
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours - theirs).norm() < 0.03 * max(1, theirs.norm())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 20), st.booleans())
def test_attention_by_products_is_the_kernel_s(B, kv_heads, group, T, is_causal):
    q = torch.randn(B, kv_heads * group, T, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, kv_heads, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = dict(is_causal=is_causal, scale=0.7, enable_gqa=group > 1)
    ours, theirs = attend_by_products(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for found, exact in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, exact)


def test_dropout_of_attention_by_products_drops_weights_and_scales_the_rest():
    q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)  # every weight is 1/64
    v = torch.eye(64).view(1, 1, 64, 64)  # so that the output is the weights
    weights = attend_by_products(q, k, v, scale=1.0, dropout_p=0.25) * 64
    torch.testing.assert_close(weights, (weights > 0) * 4 / 3)
    assert abs((weights == 0).float().mean() - 0.25) < 0.04


@pytest.mark.parametrize("hidden", [1, 427, 2976, 3199])
def test_every_whole_hidden_width_has_its_ratio(hidden):
    config = GPTConfig(n_embd=744, mlp_ratio=hidden / 744)  # 670 of the first 6,000 are no whole number after rounding
    assert config.mlp_hidden == hidden
