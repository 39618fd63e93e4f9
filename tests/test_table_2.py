"""Table 2 of a report: the arms of the runs, and the paper's numbers beside those of its setting."""

import dataclasses
import math

import pytest
import torch
from run_folders import REDUCED, write_run

import train
from model import GPT
from studies import arms, table_2
from train_config import TrainConfig

PAPER = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dataset="openwebtext")
PAPER |= dict(tokens_per_step=480 * 1024, max_iters=105_000)


def rows_of(cells):
    """The rows of Table 2 for some cells, each a dict of its columns."""
    table = table_2.table_2(cells)
    return [dict(zip(table.head, row, strict=True)) for row in table.rows]


def test_the_paper_s_numbers_are_beside_runs_of_its_setting_only(tmp_path):
    folders = [
        write_run(tmp_path / "baseline", 1, 2.91, **PAPER),
        write_run(tmp_path / "reduced", 1, 2.89, **PAPER, **REDUCED),
        write_run(tmp_path / "other", 1, 2.89, **PAPER, **REDUCED | {"attn_scale": 1.0}),
    ]
    results = arms.load(folders)
    rows = rows_of(results.best)
    assert [row["paper: loss"] for row in rows] == ["2.90", "2.88", "–"]
    assert [row["paper: parameters"] for row in rows] == ["124M", "117M", "–"]
    assert [row["parameters"] for row in rows] == ["124.4M", "117.3M", "117.3M"]
    assert "OpenWebText" in table_2.paper_note(results.best)
    short = write_run(tmp_path / "short", 1, 3.4, **PAPER | {"max_iters": 1000})
    rows = rows_of(arms.load([folders[0], short]).best)
    assert [row["paper: loss"] for row in rows] == ["2.90", "–"]
    short = arms.load([short])
    assert "paper: loss" not in rows_of(short.best)[0]
    assert table_2.paper_note(short.best).endswith("these runs use a different max_iters.")
    assert table_2.paper_note(results.best[2:]) is None


def test_weight_decay_is_one_number_or_three():
    config = dict(weight_decay=0.1, weight_decay_attn=0.0, weight_decay_mlp=None, weight_decay_embd=None)
    assert table_2.decays(config) == "0 / 0.1 / 0.1"
    assert table_2.decays(config | {"weight_decay_attn": 0.1}) == "0.1"


def test_the_decay_over_the_run_is_that_of_the_paper_s_arms():
    decays = {}
    for decay in (0.1, 2**-5):
        config = dataclasses.asdict(TrainConfig(weight_decay=decay, lr_decay_iters=600_000))
        decays[decay] = table_2.decays(config, over_the_run=True)
    assert decays == {0.1: "6.1", 2**-5: "1.9"}
    quick = dataclasses.asdict(
        TrainConfig(max_iters=400, learning_rate=3e-3, warmup_iters=40, lr_decay_iters=None, weight_decay_mlp=0.0)
    )
    assert table_2.decays(quick, over_the_run=True) == "0.066 / 0 / 0.066"


@pytest.mark.parametrize("schedule", [dict(), dict(schedule="wsd", decay_iters=10), dict(schedule="constant")])
def test_weights_without_a_gradient_shrink_as_the_sum_of_learning_rates_says(tiny, schedule):
    cfg = tiny(**schedule)
    model = GPT(cfg.model_config())
    weight = model.transformer.wte.weight
    before = weight.detach().norm()
    optimizer = train.make_optimizer(model, cfg, "cpu")
    for step in range(cfg.max_iters):
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate_at(step)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    expected = math.exp(-cfg.weight_decay * cfg.learning_rate_sum())
    assert weight.detach().norm() / before == pytest.approx(expected, rel=1e-3)
