"""The sentences and tables of a report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import REDUCED, write_run, write_study

from studies import arms, sections, verdicts


def test_runs_on_different_devices_get_a_warning(tmp_path):
    results = arms.load([write_run(tmp_path / "a", 1, 2.0), write_run(tmp_path / "b", 1, 2.0, **REDUCED)])
    results.cells[1].example.facts["device"] = "another"
    assert any(text.startswith("Warning: not all runs have the same device") for text in sections.cautions(results))


def sentences(folder):
    """The headlines, and the notes on tuning, of a study folder."""
    results = arms.load([folder])
    comparisons = arms.compare_cells(results.best_pairs)
    return verdicts.headlines(results, comparisons), sections.tuning_notes(results)


def test_an_unfinished_grid_is_provisional_and_has_no_edge(tmp_path):
    rates = {"learning_rate": [0.001, 0.002, 0.004]}
    folder = write_study(
        tmp_path / "s", {"a": {}, "b": REDUCED}, lambda arm, seed, learning_rate: 3 - 100 * learning_rate, rates
    )
    for arm in "ab":
        for path in folder.glob(f"{arm},learning_rate=0.004/*/summary.json"):
            path.unlink()
        Path(folder, f"{arm},learning_rate=0.001/seed3/summary.json").unlink()
    _, notes = sentences(folder)
    assert notes[0].startswith(
        "a and b are best at learning_rate 0.002; provisional, since 1 of 3 points have no finished run"
    )
    assert "Chosen by the seeds that all points have: 1, 2." in notes[0]
    assert not any("edge" in note for note in notes)


def test_a_point_that_diverged_is_excluded_and_the_lower_edge_stays_an_edge(tmp_path):
    rates = {"learning_rate": [0.001, 0.002, 0.004]}
    folder = write_study(tmp_path / "s", {"a": {}}, lambda arm, seed, learning_rate: 2 + learning_rate, rates)
    for path in folder.glob("a,learning_rate=0.004/*/summary.json"):
        path.rename(path.with_name("nonfinite.json"))
    _, notes = sentences(folder)
    assert notes[0].startswith("a is best at learning_rate 0.001; excluded, since a run diverged: 1 of 3 points")
    assert "provisional" not in notes[0] and "at the edge of the grid" in notes[0]


def test_default_settings_are_compared_as_well_as_best_points(tmp_path):
    generator = np.random.default_rng(0)
    loss = {("a", 0.5): 2.3, ("a", 1.0): 2.2, ("b", 0.5): 2.4, ("b", 1.0): 2.1}
    folder = write_study(
        tmp_path / "s",
        {"a": {}, "b": REDUCED},
        lambda arm, seed, attn_scale: loss[arm, attn_scale] + generator.normal(0, 1e-3),
        {"attn_scale": [0.5, 1.0]},
    )
    content = json.loads((folder / "study.json").read_text())
    for entry in content["arms"]:
        entry["configured"] = {"attn_scale": {"a": 1.0, "b": 0.5}[entry["arm"]]}
    (folder / "study.json").write_text(json.dumps(content))
    (best, chosen, own), _ = sentences(folder)
    assert own.startswith("With each arm's default settings, b (attn_scale 0.5) is worse than a (attn_scale 1), by 0.")
    assert best.startswith("At each arm's best attn_scale, b is better than a, by 0.")
    assert chosen == "Best of 2 points, chosen by these same losses: attn_scale 1 for a and b."


def test_a_difference_that_closes_with_size_is_a_trend(tmp_path):
    generator = np.random.default_rng(1)

    def loss(arm, seed, max_iters):
        gap = 0.1 - 0.02 * np.log2(max_iters / 10)
        return 3 + seed / 10 + (gap if arm == "b" else 0) + generator.normal(0, 1e-3)

    folder = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, loss, {"max_iters": [10, 20, 40]})
    for seed in (2, 3):
        Path(folder, f"b,max_iters=40/seed{seed}/summary.json").unlink()  # this size has too few seeds yet
    (*_, trend), _ = sentences(folder)
    assert trend.startswith("The difference b − a falls with max_iters (−0.0")
    assert "3 seeds, 2 sizes; max_iters 40 left out, with too few seeds)." in trend
    loss_of = {seed: loss("b", seed, 40) for seed in (2, 3)}
    for seed, value in loss_of.items():
        write_run(tmp_path / f"again{seed}", seed, value, **REDUCED, max_iters=40)
        (tmp_path / f"again{seed}/summary.json").rename(folder / f"b,max_iters=40/seed{seed}/summary.json")
    (*_, trend), _ = sentences(folder)
    assert re.match(
        r"The difference b − a falls with max_iters \(−0\.0(19|20)\d+ per doubling.*3 seeds, 3 sizes\)\.$", trend
    )


def test_runs_that_do_not_match_get_a_warning(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed, 2 + seed / 10) for seed in (1, 2)]
    folders += [write_run(tmp_path / f"b{seed}", seed, 1.9 + seed / 10, max_iters=80, block_size=8) for seed in (1, 2)]
    results = arms.load(folders)
    (warning,) = verdicts.unfair(results)
    assert warning == "Warning: b and a do not match: 2 × the training tokens, block_size 8 against 16."
    for run in results.cells[1].runs.values():
        run.facts["dtype"] = "bfloat16"
    (warning,) = verdicts.unfair(results)
    assert warning.endswith("bfloat16 against float32.")


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1e-5, "< 0.0001"), (0.04991, "0.0499"), (0.0503, "0.0503"), (0.234, "0.23")]
)
def test_a_p_value_near_the_level_has_more_digits(p, text):
    assert sections.p_text(p) == text


def test_diverged_runs_are_counted_apart_from_unfinished_ones(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed, 2.0, finished=seed < 3) for seed in (1, 2, 3, 4)]
    (folders[3] / "nonfinite.json").write_text("{}")
    results = arms.load(folders)
    assert [why for _, why in results.unfinished] == ["not finished, step 40 of 40", "diverged, step 40 of 40"]
    text = " ".join(sections.cautions(results))
    assert "Runs that diverged, and are excluded from all numbers: 1." in text
    assert "Runs that are not finished: 1." in text


def test_no_trend_is_said_in_words(tmp_path):
    generator = np.random.default_rng(2)
    folder = write_study(
        tmp_path / "s",
        {"a": {}, "b": REDUCED},
        lambda arm, seed, max_iters: 2.0 + generator.normal(0, 0.01),
        {"max_iters": [10, 20, 40]},
    )
    (*_, trend), _ = sentences(folder)
    assert trend.startswith("The difference b − a shows no significant trend with max_iters (")


def test_verdicts_come_before_their_numbers(tmp_path):
    shift = {"a": [0.0] * 3, "clear": [0.1, 0.11, 0.1], "not": [0.02, -0.01, 0.01], "same": [0.25] * 3}
    fields = {arm: {"beta1": 0.5 + i / 100} for i, arm in enumerate(shift)}
    folder = write_study(tmp_path / "s", fields, lambda arm, seed: 2 + shift[arm][seed - 1])
    clear, unclear, same = sentences(folder)[0]
    assert clear == (
        "clear is worse than a, by 0.1033 nats per token (95 % CI +0.0890 to +0.1177, p (Holm) = 0.0021, 3 seeds), a "
        "delay of 2.8 ± 0.4 steps, 7.4 ± 1.1 % of the tokens."
    )
    assert unclear.startswith("not is 0.0067 nats per token worse than a, a delay of 0.2 ± 1.0 steps, 0.5 ± 2.6 % of")
    assert "; 3 seeds are not enough to call it (95 % CI −0.03" in unclear
    assert re.search(
        r", p \(Holm\) = [0-9.]+\); detecting a difference of 0\.01 needs about \d+ seeds \(\d+ to [\d,]+\)\.$", unclear
    )
    assert same == ("same against a is inconclusive: the same difference in each of 3 seeds (+0.2500 nats per token).")
