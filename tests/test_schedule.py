"""The learning rate of every step: equal to torch's own schedulers, and refused where it cannot be."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import train
from train_config import TrainConfig

PEAK = 0.3


def rates(max_iters, **options):
    """The learning rate of each step and, last, after them."""
    cfg = TrainConfig(max_iters=max_iters, learning_rate=PEAK, **options)
    return [cfg.learning_rate_at(step) for step in range(max_iters + 1)]


def torch_rates(max_iters, warmup, begin, make_decay):
    """Those of torch: linear warm-up, PEAK until step `begin`, then make_decay(optimizer)."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    parts = [
        lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, total_iters=warmup),
        lr_scheduler.ConstantLR(optimizer, 1.0),
        make_decay(optimizer),
    ]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about steps of a scheduler that no step of the optimizer comes before
        scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[warmup, begin])
        for _ in range(max_iters + 1):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return found


sizes = {"warmup": st.integers(1, 20), "stable": st.integers(1, 20), "decay": st.integers(1, 20)}


@given(**sizes, lowest=st.sampled_from([None, 0.1]))
def test_wsd_is_torch_s_sequence_of_warm_up_constant_and_linear_decay(warmup, stable, decay, lowest):
    n = warmup + stable + decay
    found = rates(n, schedule="wsd", warmup_iters=warmup, decay_iters=decay, min_lr=lowest)
    end = (lowest or 0.0) / PEAK
    expected = torch_rates(n, warmup, n - decay, lambda o: lr_scheduler.LinearLR(o, 1.0, end, total_iters=decay))
    assert found == pytest.approx(expected, abs=1e-12)
    assert set(found[warmup : n - decay + 1]) == {PEAK}, "exactly the peak, whatever the decay is"


@given(**sizes, lowest=st.sampled_from([None, 0.1]))
def test_the_cosine_is_torch_s(warmup, stable, decay, lowest):
    end = warmup + stable + decay  # of the cosine, which may be beyond the run's
    found = rates(warmup + stable, warmup_iters=warmup, min_lr=lowest, lr_decay_iters=end)
    lowest = PEAK / 10 if lowest is None else lowest

    def cosine(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, end - warmup, eta_min=lowest)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    assert found[:warmup] == pytest.approx([PEAK * (step + 1) / (warmup + 1) for step in range(warmup)])
    scheduler = cosine(optimizer)
    for rate in found[warmup:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_cosine_ends_with_the_run_unless_told_otherwise_and_stays_at_its_end():
    cfg = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1, lr_decay_iters=None)
    assert cfg.learning_rate_at(55) == pytest.approx(0.55)
    assert cfg.learning_rate_at(100) == cfg.learning_rate_at(120) == pytest.approx(0.1)
    assert rates(50, warmup_iters=0, lr_decay_iters=100, min_lr=0.0)[50] == pytest.approx(PEAK / 2)


def test_constant_keeps_the_warm_up_and_without_one_is_decay_lr_false():
    found = rates(30, schedule="constant", warmup_iters=10)
    assert found[:10] == rates(30, schedule="wsd", decay_iters=5, warmup_iters=10)[:10]
    assert found[10:] == [PEAK] * 21
    assert rates(30, schedule="constant", warmup_iters=0) == rates(30, decay_lr=False) == [PEAK] * 31


def test_runs_of_all_lengths_share_the_rates_before_their_decay():
    long = rates(1000, schedule="wsd", warmup_iters=50, decay_iters=100)
    for n in (150, 300, 700):
        assert rates(n, schedule="wsd", warmup_iters=50, decay_iters=60)[: n - 60] == long[: n - 60]
        assert rates(n, schedule="constant", warmup_iters=50) == long[: n + 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(schedule="wsd"), ["decay_iters=None does not go with schedule=wsd"]),
        (dict(decay_iters=5), ["decay_iters=5 does not go with schedule=cosine", "lr_decay_iters"]),
        (dict(schedule="constant", decay_iters=5), ["decay_iters=5 does not go with schedule=constant"]),
        (dict(schedule="wsd", decay_iters=0), ["decay_iters must be positive, got 0"]),
        (
            dict(schedule="wsd", decay_iters=40, max_iters=2000, warmup_iters=1961),
            ["warmup_iters + decay_iters must be at most max_iters=2000, got 1961 + 40"],
        ),
        (dict(max_iters=40, warmup_iters=50), ["warmup_iters must be at most max_iters=40, got 50"]),
        (dict(decay_lr=False, schedule="wsd", decay_iters=5), ["decay_lr=False leaves no schedule", "schedule=wsd"]),
        (dict(schedule="linear"), ["schedule must be one of cosine, wsd, constant"]),
        (dict(max_seconds=0), ["max_seconds must be positive"]),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(refuses, options, words):
    refuses(train.main, *(f"--{name}={value}" for name, value in options.items()), words=words)
