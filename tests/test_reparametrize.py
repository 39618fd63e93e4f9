"""The results of the paper's Sections 3 and 4 as equalities of logits in float64, and what they do not cover."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from random_models import ATTENTION_SKIP_ONLY, EXACT, SMALL, attention, difference, normal, random_model

from engine import decode
from model import GPT, GPTConfig
from theory import reparametrize
from theory.reparametrize import eliminate
from theory.weights import read_weights


@pytest.mark.parametrize("width", [16, 8, 4])
def test_lemma_3_1_a_change_of_basis_takes_the_place_of_w_q(width):
    x, w_q, w_k, w_v = normal(9, 16), normal(16, 16, seed=1), normal(16, width, seed=2), normal(16, width, seed=3)
    theta, changed_k, changed_v = reparametrize.change_of_basis(w_q, w_k, w_v)
    assert torch.equal(theta, w_q)
    changed = attention(x @ theta, torch.eye(16).double(), changed_k, changed_v, n_head=4)
    torch.testing.assert_close(changed, attention(x, w_q, w_k, w_v, n_head=4), rtol=1e-10, atol=1e-10)


def test_proposition_4_1_a_single_head_merges_w_q_into_w_k_even_when_singular():
    x, w_q, w_k, w_v = (normal(*shape, seed=i) for i, shape in enumerate([(9, 6), (6, 6), (6, 6), (6, 6)]))
    w_q[:, 0] = 0
    merged = attention(x, torch.eye(6).double(), reparametrize.merge_query_into_key(w_q, w_k), w_v, n_head=1)
    expected = attention(x, w_q, w_k, w_v, n_head=1)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    in_two_heads = attention(x, torch.eye(6).double(), reparametrize.merge_query_into_key(w_q, w_k), w_v, n_head=2)
    assert (in_two_heads - attention(x, w_q, w_k, w_v, n_head=2)).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "dyt", "none"])
def test_proposition_4_1_holds_for_any_norm_and_skips(norm):
    skips = [(True, True), (True, False), (False, True), (False, False)]
    for seed, ((attn_skip, mlp_skip), share, pos) in enumerate(itertools.product(skips, (0, 1), ("learned", "none"))):
        choice = dict(SMALL, n_head=1, norm=norm, attn_skip=attn_skip, mlp_skip=mlp_skip, share_layers=bool(share))
        model = random_model(seed, 1e12, **choice, pos=pos, causal=seed % 3 > 0)
        for which in "qk":
            assert reparametrize.covering_result(model, which) == "Proposition 4.1"
            reduced = eliminate(model, which)
            assert getattr(reduced.config, f"w{which}_identity")
            assert difference(model, reduced) < EXACT


def test_proposition_4_1_merges_a_key_with_biases_but_no_query_with_one():
    model = random_model(**dict(SMALL, n_head=1, norm="layernorm"), bias=True)
    assert difference(model, eliminate(model, "k")) < EXACT
    with pytest.raises(ValueError, match="norm=layernorm"):
        eliminate(model, "q")
    for block in model.transformer.h:
        block.attn.c_attn.bias.data[:16] = 0
    assert difference(model, eliminate(model, "q")) < EXACT


def test_proposition_4_1_does_not_hold_with_rotary_positions():
    single = dict(SMALL, n_head=1, norm="layernorm", pos="rope")
    model = random_model(**single)
    with pytest.raises(ValueError, match="Remark 5"):
        eliminate(model)
    without_positions = eliminate(random_model(**dict(single, pos="none")))
    without_positions.config.pos = "rope"
    reduced = GPT(without_positions.config).double().eval()
    reduced.load_state_dict(without_positions.state_dict())
    assert difference(model, reduced) > 1e-3


@pytest.mark.parametrize("which", "qk")
def test_proposition_4_1_does_not_hold_with_normalised_queries_and_keys(which):
    model = random_model(**dict(SMALL, n_head=1, norm="layernorm", qk_norm=True))
    with pytest.raises(ValueError, match="Remark 5"):
        eliminate(model, which)
    assert reparametrize.covering_result(model, "v") == "Remark 1"
    assert reparametrize.covering_result(random_model(**dict(SMALL, n_head=1, qk_norm=True)), which, 0) == "Lemma 8.4"


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_remark_1_the_value_and_output_matrices_of_a_single_head_are_one(pos):
    model = random_model(cond=1e12, **dict(SMALL, n_head=1, norm="rmsnorm", pos=pos), bias=True)
    assert reparametrize.covering_result(model, "v") == "Remark 1"
    reduced = eliminate(model, "v")
    assert difference(model, reduced) < EXACT
    if pos == "learned":
        both = eliminate(eliminate(random_model(**dict(SMALL, n_head=1)), "q"), "v")
        assert both.config.wq_identity
        assert both.config.wv_identity
        assert difference(random_model(**dict(SMALL, n_head=1)), both) < EXACT


def sizes(seed):
    """Random sizes and options on which no theorem depends."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (1,), generator=generator)]

    n_head = pick(2, 3, 4)
    n_embd = n_head * pick(4, 6, 8)
    n_expert = pick(0, 0, 3)
    return dict(
        block_size=pick(7, 12),
        vocab_size=pick(11, 40),
        n_head=n_head,
        n_embd=n_embd,
        n_layer=pick(1, 2, 3, 5),
        mlp_ratio=pick(1.5, 2.0, 4.0),
        activation=pick("gelu", "relu", "gelu_tanh", "relu_squared", "relu" if n_expert else "swiglu"),
        causal=pick(True, False),
        attn_scale=pick(0.5, 1.0),
        pos=pick("learned", "rope", "none"),
        n_expert=n_expert,
        n_kv_head=pick(None, 1),
        qk_norm=pick(False, True),
        norm="none",
    )


def parameters_saved(model, reduced):
    """The parameters that eliminate removes: d² per block, less a second embedding matrix in a model that is untied."""
    config = model.config
    untied = config.tie_weights and not reduced.config.tie_weights
    n_block = len(model.transformer.h)
    return n_block * (config.n_embd**2 + config.bias * config.n_embd) - untied * config.vocab_size * config.n_embd


def check_eliminated(model, which):
    reduced = eliminate(model, which)
    assert max(reparametrize.condition_numbers(model, which).values()) < 1e3
    assert difference(model, reduced) < EXACT, model.config
    assert getattr(reduced.config, f"w{which}_identity")
    assert model.num_params().total - reduced.num_params().total == parameters_saved(model, reduced)
    return reduced


@pytest.mark.parametrize(
    ("changes", "n_bases"),
    [
        (dict(), 1),
        (dict(mlp_skip=False), 4),
        (dict(attn_skip=False), 4),
        (dict(attn_skip=False, mlp_skip=False), 7),
        (dict(parallel=True), 1),
        (dict(parallel=True, attn_skip=False, mlp_skip=False), 4),
        (dict(share_layers=True), 1),
        (dict(share_layers=True, mlp_skip=False), 1),
        (dict(share_layers=True, attn_skip=False, mlp_skip=False), 2),
    ],
    ids=str,
)
def test_skips_and_shared_blocks_decide_how_many_bases_a_stream_has(changes, n_bases):
    assert len(set(reparametrize.stream_groups(GPTConfig(**SMALL, **changes)))) == n_bases


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_theorem_4_1_attention_skip_only(which, tied):
    for seed in range(40):
        choice = sizes(seed) | (dict(n_kv_head=None) if which != "q" else {})
        model = random_model(seed, 10 ** (seed % 3), **choice, mlp_skip=False, tie_weights=tied)
        assert reparametrize.covering_result(model, which) == "Theorem 4.1"
        assert check_eliminated(model, which).config.tie_weights == tied


def test_theorem_4_1_weights_are_those_of_its_proof():
    model = random_model(**ATTENTION_SKIP_ONLY)
    old, new = read_weights(model), read_weights(eliminate(model))
    thetas = [block["q"].weight for block in old.blocks]
    thetas.append(torch.linalg.inv(thetas[0].T))
    close = torch.testing.assert_close
    close(new.tokens, old.tokens @ thetas[0])
    close(new.positions, old.positions @ thetas[0])
    close(new.head.weight, thetas[0].T @ old.head.weight)
    for i, (before, after) in enumerate(zip(old.blocks, new.blocks, strict=True)):
        inverse = torch.linalg.inv(thetas[i])
        assert "q" not in after
        for name in ("k", "v", "up"):
            close(after[name].weight, inverse @ before[name].weight)
        close(after["o"].weight, before["o"].weight @ thetas[i])
        close(after["down"].weight, before["down"].weight @ thetas[i + 1])


@pytest.mark.parametrize(
    "changes",
    [
        dict(attn_skip=False),
        dict(attn_skip=False, mlp_skip=False),
        dict(attn_skip=False, mlp_skip=False, parallel=True),
        dict(mlp_skip=False, share_layers=True),
    ],
    ids=str,
)
def test_theorem_4_1_proof_covers_fewer_skips(changes):
    for seed in range(12):
        check_eliminated(random_model(seed, **sizes(seed), **changes, tie_weights=seed % 2 == 0), "q")


@pytest.mark.parametrize("skips", [dict(), dict(parallel=True)], ids=str)
def test_theorem_4_2_shared_layers_with_all_skips(skips):
    for seed, which in enumerate("qkv" * 8):
        choice = sizes(seed) | (dict(n_kv_head=None) if which != "q" else {})
        model = random_model(seed, **choice, **skips, share_layers=True, tie_weights=seed % 2 == 0)
        assert reparametrize.covering_result(model, which) == "Theorem 4.2"
        check_eliminated(model, which)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_remark_2_tied_models_with_shared_layers_come_out_untied(orthogonal):
    model = random_model(cond=1.0 if orthogonal else 30.0, **SMALL, share_layers=True)
    reduced = eliminate(model)
    assert not reduced.config.tie_weights
    w_q, embedding = read_weights(model).blocks[0]["q"].weight, model.transformer.wte.weight
    torch.testing.assert_close(reduced.transformer.wte.weight, embedding @ w_q)
    torch.testing.assert_close(reduced.lm_head.weight.T, torch.linalg.inv(w_q) @ embedding.T)
    # They could have stayed one matrix only where W_Q is orthogonal (here up to a factor of 2).
    ratio = reduced.transformer.wte.weight / reduced.lm_head.weight
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0)) == orthogonal


@pytest.mark.parametrize("changes", [dict(), dict(parallel=True)], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_one_stream_loses_the_projection_of_one_layer(which, changes):
    for seed in range(9):
        choice = sizes(seed) | dict(n_layer=3, n_kv_head=2 if which == "q" and sizes(seed)["n_head"] % 2 == 0 else None)
        model = random_model(seed, **choice, **changes, tie_weights=seed % 2 == 0)
        with pytest.raises(ValueError, match="join all 3 layers into one residual stream"):
            eliminate(model, which)
        layer = seed % 3
        reduced = eliminate(model, which, layer)
        assert difference(model, reduced) < EXACT
        d = model.config.n_embd
        identities = [torch.equal(block[which].weight, torch.eye(d).double()) for block in read_weights(reduced).blocks]
        assert identities == [i == layer for i in range(3)]
        assert not getattr(reduced.config, f"w{which}_identity")
        assert not reduced.config.tie_weights


def test_layers_can_lose_the_projection_one_by_one():
    model = random_model(**ATTENTION_SKIP_ONLY)
    partial = model
    for layer in (1, 0, 2):
        partial = eliminate(partial, layer=layer)
        assert difference(model, partial) < EXACT
    final = eliminate(partial)
    assert final.config.wq_identity
    assert difference(model, final) < EXACT


@pytest.mark.parametrize("pos", ["learned", "none"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_biases_go_into_the_origin_of_the_stream(which, pos):
    sequential = [dict(mlp_skip=False), dict(attn_skip=False), dict(attn_skip=False, mlp_skip=False), dict()]
    parallel = [dict(parallel=True), dict(parallel=True, attn_skip=False, mlp_skip=False)]
    for seed, (changes, n_expert) in enumerate(itertools.product(sequential + parallel, (0, 3))):
        tied = seed % 4 < 2
        model = random_model(seed, **SMALL, **changes, pos=pos, n_expert=n_expert, bias=True, tie_weights=tied)
        layer = 1 if changes in (dict(), dict(parallel=True)) else None
        if "parallel" in changes and n_expert:
            with pytest.raises(ValueError, match=r"mlp\.router, which has no bias"):
                eliminate(model, which, layer)
            continue
        reduced = eliminate(model, which, layer)
        assert difference(model, reduced) < EXACT, changes
        if layer is None:
            assert reduced.config.tie_weights == (tied and pos == "learned")


def test_a_bias_of_shared_layers_reaches_the_lm_head_and_is_refused():
    model = random_model(**SMALL, share_layers=True, bias=True)
    with pytest.raises(ValueError, match="lm_head, which has no bias"):
        eliminate(model)
    model.transformer.h[0].attn.c_attn.bias.data[:16] = 0
    assert difference(model, eliminate(model)) < EXACT


@pytest.mark.parametrize("change", [dict(mlp_skip=True), dict(norm="layernorm"), dict(norm="rmsnorm")], ids=str)
def test_the_rewritten_weights_are_not_equal_outside_the_assumptions(change):
    model = random_model(**ATTENTION_SKIP_ONLY)
    pair = []
    for one in (model, eliminate(model)):
        other = GPT(dataclasses.replace(one.config, **change)).double().eval()
        other.load_state_dict(one.state_dict(), strict=False)
        pair.append(other)
    assert difference(*pair) > 1e-2


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "dyt"])
def test_remark_5_no_norm_is_passed_exactly(norm):
    for changes in (dict(mlp_skip=False), dict(), dict(share_layers=True)):
        with pytest.raises(ValueError) as refusal:
            eliminate(random_model(**dict(SMALL, norm=norm), **changes))
        for word in (f"norm={norm}", "Remark 5", "train with wq_identity=True", "fine-tune"):
            assert word in str(refusal.value)


@pytest.mark.parametrize(
    "changes", [dict(), dict(pos="rope", n_kv_head=2), dict(n_expert=3, tie_weights=False)], ids=str
)
def test_rewritten_models_generate_the_same_200_tokens(changes):
    model = random_model(5, **ATTENTION_SKIP_ONLY, **changes)
    reduced = eliminate(model)
    start = torch.tensor([[1], [2], [3]])
    tokens = decode.generate(model, start, 200, temperature=0)
    assert len(tokens.unique()) > 5
    assert torch.equal(decode.generate(reduced, start, 200, temperature=0), tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_is_left_alone_and_its_dtype_and_mode_kept(dtype):
    model = random_model(cond=3, **ATTENTION_SKIP_ONLY, dropout=0.2).to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    reduced = eliminate(model)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # nor does it draw random numbers
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in reduced.parameters()} == {dtype}
    assert reduced.training
    assert not eliminate(copy.deepcopy(model).eval()).training
    assert reduced.transformer.wte.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    bound = {torch.float64: EXACT, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    assert difference(model.eval().double(), reduced.eval().double()) < bound


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w[3].zero_(), ["layer 2", "W_Q", "singular"]),
        (lambda w: w[3].mul_(1e-8).add_(w[4]), ["layer 2", "W_Q", "badly conditioned", "max_cond=1e+06"]),
        (lambda w: w.zero_(), ["layer 2", "W_Q", "singular"]),
    ],
)
def test_a_theta_without_a_usable_inverse_is_refused_with_its_layer(spoil, words):
    model = random_model(**ATTENTION_SKIP_ONLY)
    spoil(model.transformer.h[2].attn.c_attn.weight.data)
    with pytest.raises(ValueError) as refusal:
        eliminate(model)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert difference(model, eliminate(model, layer=1)) < EXACT


def test_broken_weights_are_refused_by_name():
    model = random_model(**ATTENTION_SKIP_ONLY)
    model.transformer.h[2].mlp.c_fc.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"h\.2\.mlp\.c_fc\.weight must be finite"):
        eliminate(model)


def test_max_cond_is_the_limit():
    model = random_model(cond=1e4, **ATTENTION_SKIP_ONLY)
    with pytest.raises(ValueError, match="layer 0"):
        eliminate(model, max_cond=9.9e3)
    assert difference(model, eliminate(model, max_cond=1.01e4)) < 1e-8


@pytest.mark.parametrize(
    ("changes", "which", "layer", "words"),
    [
        (dict(wq_identity=True), "q", None, ["wq_identity=True", "already"]),
        (dict(wq_identity=True), "k", None, ["wq_identity=True", "W_Q would not be"]),
        (dict(n_head=1, wk_identity=True), "q", None, ["wk_identity=True", "W_K would not be"]),
        (dict(n_kv_head=2), "k", None, ["W_K is not square", "n_kv_head=2"]),
        (dict(n_kv_head=2), "v", None, ["W_V is not square", "n_kv_head=2"]),
        (dict(), "o", None, ["which", "q, k or v"]),
        (dict(), "q", 3, ["layer must be", "below 3", "got 3"]),
        (dict(), "q", -1, ["layer must be at least 0", "got -1"]),
        (dict(share_layers=True), "q", 1, ["below 1", "got 1"]),
        (dict(mlp_skip=True), "q", None, ["one residual stream", "layer=0 to layer=2"]),
        (dict(mlp_skip=True, parallel=True), "q", None, ["one residual stream"]),
    ],
)
def test_what_no_result_covers_is_refused_with_the_reason(changes, which, layer, words):
    model = random_model(**{**ATTENTION_SKIP_ONLY, **changes})
    with pytest.raises(ValueError) as refusal:
        eliminate(model, which, layer)
    assert all(word in str(refusal.value) for word in words), refusal.value
