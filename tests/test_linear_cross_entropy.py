"""The loss without whole logits: equal to torch's own, value and gradients, and never as large as them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine import linear_cross_entropy
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
        with torch.no_grad():
            losses = linear_cross_entropy.linear_cross_entropy(x, weight, targets, reduction="none")
            alone = linear_cross_entropy.linear_cross_entropy(x, weight, targets)
    assert torch.equal(alone, loss.detach())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients)
    torch.testing.assert_close(losses, plain(x, weight, targets, "none").detach())


@pytest.mark.parametrize("n", [257, 768, 1000])
def test_under_autocast_its_gradients_are_those_of_torch(n):
    """The same products of the same rounded numbers: they agree far beyond bfloat16's precision of 0.4 %."""
    x, weight, targets = (t.detach() for t in example(n, 64, 1000, seed=n))
    x, weight = x.float().requires_grad_(), (0.1 * weight).float().requires_grad_()
    gradients = []
    for function in (linear_cross_entropy.linear_cross_entropy, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, weight, targets, "mean")
        gradients.append(torch.autograd.grad(loss, (x, weight)))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_a_bfloat16_weight_s_gradient_is_summed_in_float32(monkeypatch):
    x, weight, targets = example(512, 16, 50, seed=0)
    exact = torch.autograd.grad(plain(x, weight, targets, "mean"), weight)[0]
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 50 * 8)
    halves = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    found = torch.autograd.grad(linear_cross_entropy.linear_cross_entropy(*halves, targets), halves[1])[0]
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_what_it_cannot_do_is_refused():
    x, weight, targets = example(8, 3, 5, seed=0)
    with pytest.raises(AssertionError, match="no gradient"):
        linear_cross_entropy.linear_cross_entropy(x, weight, targets, reduction="none")
    targets[2] = -100  # not the one that is ignored
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy.linear_cross_entropy(x, weight, targets)


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
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=100, block_size=64)
    idx = torch.randint(100, (4, 64))
    most, loss = {}, {}
    for chunked, linear_loss in ((False, None), (True, linear_cross_entropy.linear_cross_entropy)):
        torch.manual_seed(0)
        model = GPT(config, linear_loss)
        with Largest() as largest:
            _, loss[chunked] = model(idx, idx)
            loss[chunked].backward()
        most[chunked] = largest.elements
    torch.testing.assert_close(loss[True], loss[False])
    assert most[False] == 4 * 64 * 100
    assert most[True] <= 4 * 64 * 4 * 8  # the MLP's hidden units: 32 a token, not 100


@pytest.mark.parametrize("changes", [dict(), dict(objective="mlm", causal=False), dict(n_expert=4)], ids=str)
def test_a_run_with_chunked_loss_is_the_run_without(tiny, monkeypatch, changes):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 500)
    found = [
        train.train(tiny(out_dir=f"{chunked}", chunked_loss=chunked, max_iters=20, device="cpu", **changes))["val_loss"]
        for chunked in (True, False)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_which_runs_have_a_chunked_loss(tiny):
    def chosen(**changes):
        return train.Trainer(tiny(device="cpu", **{"vocab_size": 1024, **changes})).compute.linear_loss

    assert chosen() is chosen(dtype="bfloat16") is linear_cross_entropy.linear_cross_entropy
    assert chosen(vocab_size=1000) is None
    assert chosen(vocab_size=1000, chunked_loss=True) is linear_cross_entropy.linear_cross_entropy
    assert chosen(compile=True) is chosen(dtype="float16") is chosen(chunked_loss=False) is None
    with pytest.raises(ValueError, match="float16"):
        chosen(chunked_loss=True, dtype="float16")


def test_a_compiled_model_leaves_the_chunks_alone(tiny, monkeypatch, traced):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 500)
    found = [
        train.train(tiny(out_dir=f"{changes}", max_iters=3, device="cpu", **changes))["val_loss"]
        for changes in (dict(chunked_loss=True, compile=True), dict(chunked_loss=False))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
