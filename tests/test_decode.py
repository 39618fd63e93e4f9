"""Decoding with a cache gives what the model gives without one; sampling follows the distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import randomise

from engine import decode
from engine.decode import sample_token
from model import GPT, GPTConfig

SHAPE = dict(block_size=24, vocab_size=97, n_layer=3, n_head=4, n_embd=32)
ARCHITECTURES = [
    dict(),
    dict(wq_identity=True, attn_scale=0.5, tie_weights=False),
    dict(wq_identity=True, wv_identity=True, bias=True),
    dict(n_kv_head=2, pos="rope"),
    dict(wq_identity=True, n_kv_head=1, pos="rope", norm="rmsnorm"),
    dict(pos="none", wk_identity=True, norm="dyt"),
    dict(parallel=True, wq_identity=True),
    dict(share_layers=True, n_expert=4, norm="none"),
    dict(attn_skip=False, wk_identity=True, pos="rope"),
]


def uncached(model, idx, n_new):
    """The likeliest continuation, with the whole window computed for each token."""
    for _ in range(n_new):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def make(seed=5, **changes):
    torch.manual_seed(seed)
    return randomise(GPT(GPTConfig(**{**SHAPE, **changes}))).eval()


@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_greedy_tokens_are_those_of_the_uncached_model(changes):
    model = make(**changes)
    for n_prompt, n_new in ((1, 23), (7, 40), (24, 3), (30, 5), (20, 1)):  # the last ones go past the block size
        idx = torch.randint(97, (2, n_prompt))
        assert torch.equal(decode.generate(model, idx, n_new, temperature=0), uncached(model, idx, n_new))


@torch.no_grad()
@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_logits_are_those_of_the_uncached_model_however_the_tokens_come(changes, few_shapes, monkeypatch):
    monkeypatch.setattr(decode.KVCache, "STRIDE", 8)
    model = make(**changes).double()
    idx = torch.randint(97, (3, 20))
    cache = decode.KVCache(model, 3, 20, few_shapes=few_shapes)
    for chunk in idx.split([5, 1, 1, 9, 4], dim=1):
        cache.advance(chunk.size(1))
        logits, _ = model(chunk, cache=cache)
        torch.testing.assert_close(logits, model(idx[:, : cache.n_tokens])[0])


def test_samples_of_a_prompt_share_its_prefill():
    model = make()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    idx = torch.randint(97, (2, 9))
    tokens = decode.generate(model, idx, 6, num_samples=3, generator=torch.Generator().manual_seed(0))
    assert seen == [(2, 9)] + [(6, 1)] * 5
    assert tokens.shape == (6, 15)
    assert torch.equal(tokens[:, :9], idx.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    again = decode.generate(model, idx, 6, num_samples=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, tokens)
    greedy = decode.generate(model, idx, 6, temperature=0, num_samples=2)
    assert torch.equal(greedy[::2], greedy[1::2])
    assert torch.equal(greedy[::2], uncached(model, idx, 6))


@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_the_layout_of_the_weights_changes_their_order_in_memory_alone(changes):
    model = make(**changes)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters, idx = dict(model.named_parameters()), torch.randint(97, (1, 7))
    expected = uncached(model, idx, 10)
    decode.lay_out(model, 1)
    assert model.lm_head.weight.stride() == (1, 97) and not model.lm_head.weight.is_contiguous()
    assert torch.equal(decode.generate(model, idx, 10, temperature=0), expected)
    for order in (dict(), dict(n_decoded=2), dict(n_decoded=1, dtype=torch.bfloat16)):
        decode.lay_out(model, 1)
        decode.lay_out(model, **order)
        assert all(parameter.is_contiguous() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, before[name])


def test_under_autocast_the_cache_is_bfloat16():
    model = make(wq_identity=True, wv_identity=True)
    idx = torch.randint(97, (2, 10))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = decode.KVCache(model, 2, 16)
        for chunk in idx.split([7, 3], dim=1):
            cache.advance(chunk.size(1))
            logits, _ = model(chunk, cache=cache)
        expected, _ = model(idx)
    assert {kept.dtype for layer in cache.tensors for kept in layer} == {torch.bfloat16}
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_compiled_steps_give_the_same_tokens_and_compile_for_the_first_alone(monkeypatch):
    compiled, graphs, numbers = torch.compile, [], []

    def backend(graph, inputs):  # the code generator of the default takes a minute and adds nothing here
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_here(model, dynamic, options):
        return compiled(model, backend=backend, dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_here)
    model = make(wq_identity=True, pos="rope")
    idx = torch.randint(97, (1, 4))
    tokens = decode.generate(
        model, idx, 20, temperature=0, compile_step=True, progress=lambda _: numbers.append(len(graphs))
    )
    assert torch.equal(tokens, uncached(model, idx, 20))
    assert numbers[0] == 0 < numbers[1] == numbers[-1]  # the prompt, the first step, all others


@settings(max_examples=50)
@given(top_k=st.integers(1, 12), top_p=st.floats(0.05, 1.0), seed=st.integers(0, 2**31))
def test_sampling_draws_only_what_top_k_and_top_p_leave(top_k, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 10, generator=generator) * 2
    p = logits.softmax(-1)[0]
    order = p.argsort(descending=True).tolist()
    smallest = next(n for n in range(1, 11) if n == 10 or p[order[:n]].sum() >= top_p - 1e-6)
    draws = {sample_token(logits, top_k=top_k, generator=generator).item() for _ in range(40)}
    assert draws <= set(order[:top_k])
    draws = {sample_token(logits, top_p=top_p, generator=generator).item() for _ in range(40)}
    assert draws <= set(order[: min(10, smallest + 1)])
    assert sample_token(logits, temperature=0).item() == order[0]


def test_sampling_follows_the_distribution():
    generator = torch.Generator().manual_seed(6)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample_token(logits, temperature=2.0, generator=generator)] += 1
    torch.testing.assert_close(counts / 4000, (logits / 2).softmax(-1)[0], rtol=0, atol=0.03)
