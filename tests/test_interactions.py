"""Whether two pairs of arms that differ in the same options differ by as much."""

import numpy as np
import pytest
from run_folders import REDUCED, write_study
from scipy import stats

from studies import arms, verdicts

UNTIED = dict(tie_weights=False)
COLUMNS = {"tied": {}, "reduced": REDUCED, "untied": UNTIED, "reduced_untied": UNTIED | REDUCED}
CONTROL = {"reduced": "tied", "reduced_untied": "untied"}


def headlines(folder, own, loss, **options):
    results = arms.load([write_study(folder, own, loss, **options)])
    return verdicts.headlines(results, arms.compare_cells(results.best_pairs)), results


@pytest.mark.parametrize("interaction", [0.0, 0.05])
def test_the_columns_of_table_2(tmp_path, interaction):
    generator = np.random.default_rng(5)
    shift = {"tied": 0.0, "reduced": 0.02, "untied": -0.03, "reduced_untied": -0.01 + interaction}

    def loss(arm, seed):
        return 2 + seed / 10 + shift[arm] + generator.normal(0, 0.004)

    found, results = headlines(tmp_path / "s", COLUMNS, loss, seeds=(1, 2, 3, 4, 5), control=CONTROL)
    (sentence,) = [text for text in found if "difference than" in text]
    of = {cell.arm: np.array([cell.losses[seed] for seed in sorted(cell.losses)]) for cell in results.cells}
    own, first = of["reduced_untied"] - of["untied"], of["reduced"] - of["tied"]
    expected = stats.ttest_1samp(own - first, 0)
    is_not = "is" if interaction else "is not seen to be"
    assert sentence.startswith(
        f"reduced_untied − untied {is_not} another difference than reduced − tied "
        f"(by {np.mean(own - first):+.4f} nats per token, 95 % CI ".replace("-0", "−0")
    )
    assert (expected.pvalue < 0.05) == bool(interaction)
    low, high = expected.confidence_interval(0.95)
    assert f"95 % CI {low:+.4f} to {high:+.4f}, p".replace("-0", "−0") in sentence and "5 seeds" in sentence


def test_pairs_of_other_changes_or_of_one_control_have_none(tmp_path):
    def loss(arm, seed):
        return 2 + seed / 10 + len(arm) / 100 + seed**2 / 1000 * len(arm)

    narrow = {"tied": {}, "reduced": REDUCED, "narrow": dict(n_embd=8), "narrow_untied": dict(n_embd=8, **UNTIED)}
    for own, control in ((narrow, {"reduced": "tied", "narrow_untied": "narrow"}), ({"a": {}, "b": REDUCED}, None)):
        found, _ = headlines(tmp_path / f"{len(own)}", own, loss, control=control)
        assert not any("difference than" in text for text in found)


def test_many_pairs_are_counted(tmp_path):
    generator = np.random.default_rng(7)
    own, control = {}, {}
    for i in range(8):
        own[f"base{i}"] = {"beta1": 0.5 + i / 100}
        own[f"reduced{i}"] = own[f"base{i}"] | REDUCED
        control[f"reduced{i}"] = f"base{i}"

    def loss(arm, seed):
        return 2 + seed / 10 + 0.1 * (arm == "reduced3") + generator.normal(0, 0.001)

    found, _ = headlines(tmp_path / "s", own, loss, seeds=(1, 2, 3, 4), control=control)
    (sentence,) = [text for text in found if text.startswith("7 differences were compared with reduced0 − base0")]
    assert "by p (Holm) 1 clearly differ: reduced3 − base3 (+0.1" in sentence


def test_losses_of_different_objectives_are_not_compared(tmp_path):
    def loss(arm, seed):
        return 2 + seed / 10 + len(arm) * seed**2 / 1000

    encoder = dict(objective="mlm", causal=False)
    own = {"a": {}, "a_reduced": REDUCED, "e": encoder, "e_reduced": encoder | REDUCED}
    found, results = headlines(tmp_path / "s", own, loss, control={"a_reduced": "a", "e_reduced": "e"})
    assert len(results.best_pairs) == 2 and not any("difference than" in text for text in found)
