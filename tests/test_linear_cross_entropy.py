"""The loss without whole logits: equal to torch's own, value and gradients, and never as large as them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import linear_cross_entropy
import train
from model import GPT, GPTConfig


def plain(x, weight, targets, reduction):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1, reduction=reduction)


def example(n, d, vocab_size, seed, ignored=0.3):
    """x, weight and targets, of which about the share `ignored` does not count, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, d, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(vocab_size, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -1
    targets[0] = vocab_size - 1  # one counts
    return x, weight, targets


@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    vocab_size=st.integers(1, 30),
    chunk=st.integers(1, 200),
    part=st.integers(1, 100),
    factor=st.floats(0.1, 8),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_torch_for_any_size_of_chunk(n, d, vocab_size, chunk, part, factor, seed):
    x, weight, targets = example(n, d, vocab_size, seed)
    expected = plain(x, weight, targets, "mean")
    gradients = torch.autograd.grad(expected * factor, (x, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "CHUNK", chunk)
        patch.setattr(linear_cross_entropy, "PART", part)
        loss = linear_cross_entropy.linear_cross_entropy(x, weight, targets)
        found = torch.autograd.grad(loss * factor, (x, weight))
        losses = linear_cross_entropy.linear_cross_entropy(x, weight, targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients)
    torch.testing.assert_close(losses, plain(x, weight, targets, "none").detach())


def test_in_bfloat16_it_is_as_near_to_float64_as_torch_is():
    x, weight, targets = (t.detach() for t in example(512, 64, 1000, seed=0))
    weight *= 0.1
    x, weight = (t.float().requires_grad_() for t in (x, weight))
    exact = torch.autograd.grad(plain(x.double(), weight.double(), targets, "mean"), (x, weight))

    def errors(function):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, weight, targets, "mean")
        gradients = torch.autograd.grad(loss, (x, weight))
        return [(a - b).norm() / b.norm() for a, b in zip(gradients, exact, strict=True)]

    for ours, theirs in zip(errors(linear_cross_entropy.linear_cross_entropy), errors(plain), strict=True):
        assert ours < 1.2 * theirs < 0.02


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor has which an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_a_model_with_chunked_loss_never_has_all_logits(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 500)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=100, block_size=64))
    idx = torch.randint(100, (4, 64))
    most, loss = {}, {}
    for model.chunked_loss in (False, True):
        with Largest() as largest:
            _, loss[model.chunked_loss] = model(idx, idx)
            loss[model.chunked_loss].backward()
        most[model.chunked_loss] = largest.elements
    torch.testing.assert_close(loss[True], loss[False])
    assert most[False] == 4 * 64 * 100
    assert most[True] <= 4 * 64 * 4 * 8  # the MLP's hidden units: 32 a token, not 100


def test_a_run_with_chunked_loss_is_the_run_without(tiny, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 500)
    results = [
        train.train(tiny(out_dir=f"chunked-{chunked}", chunked_loss=chunked, max_iters=20)) for chunked in (True, False)
    ]
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], abs=1e-5)


def test_chunks_are_for_a_cpu_that_does_not_compile(tiny):
    assert train.Trainer(tiny()).model.chunked_loss
    assert not train.Trainer(tiny(compile=True)).model.chunked_loss
    assert not train.Trainer(tiny(chunked_loss=False)).model.chunked_loss
