import json

import numpy as np
import pytest
from run_folders import REDUCED, write_run, write_study

from studies import arms, comparison, options


def test_runs_that_differ_in_the_seed_alone_are_one_arm(tmp_path):
    names = ["base-s1", "base-s2", "small", "red-seed1", "red-seed2"]
    fields = [{}, {}, dict(n_embd=8), REDUCED, REDUCED]
    folders = [tmp_path / name for name in names]
    for folder, more, seed in zip(folders, fields, (1, 2, 1, 1, 2), strict=True):
        write_run(folder, seed, loss=2.0, resume=seed == 2, log_interval=seed, **more)
    results = arms.load(folders)
    assert results.arms == ["base", "small", "red"]
    assert [sorted(cell.runs) for cell in results.cells] == [[(1, 1), (2, 2)], [(1, 1)], [(1, 1), (2, 2)]]
    assert {cell.control for cell in results.cells} == {"base"}
    assert {cell.control for cell in arms.load(folders, control="red").cells} == {"red"}


def test_runs_named_by_seed_take_the_name_of_their_folder(tmp_path):
    folders = [
        write_run(tmp_path / f"{arm}/seed{seed}", seed, 2.0, **more)
        for arm, more in (("a", {}), ("b", REDUCED))
        for seed in (1, 2)
    ]
    assert arms.load(folders).arms == ["a", "b"]
    again = write_run(tmp_path / "other" / "a" / "seed1", 1, 2.0, n_embd=8)
    assert arms.load([*folders, again]).arms == [str(folders[0]), "b", str(again)]


def test_a_run_older_than_an_option_had_its_default(tmp_path):
    folders = [write_run(tmp_path / name, seed, 2.0) for name, seed in (("a-s1", 1), ("a-s2", 2))]
    config = json.loads((folders[0] / "config.json").read_text())
    for name in ("objective", "norm"):
        del config[name]
    (folders[0] / "config.json").write_text(json.dumps(config))
    assert arms.load(folders).arms == ["a"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    a = write_run(tmp_path / "a", 1, 2.0)
    copy = write_run(tmp_path / "b", 1, 2.0)
    with pytest.raises(ValueError, match=f"{a} and {copy} both have seed 1 .* must have each seed once"):
        arms.load([a, copy])
    other_data = write_run(tmp_path / "c", 2, 2.0, fingerprint="def")
    with pytest.raises(ValueError, match=r"different data .*abc and def"):
        arms.load([a, other_data])
    with pytest.raises(ValueError, match=r"control must be an arm with a finished run \(one of a\), got 'z'"):
        arms.load([a], control="z")
    with pytest.raises(ValueError, match="neither a study nor a run"):
        arms.load([tmp_path])
    unfinished = write_run(tmp_path / "d", 2, 2.0, finished=False)
    with pytest.raises(ValueError, match=r"nothing to report, .*/d is not finished, step 40 of 40"):
        arms.load([unfinished])
    study = write_study(tmp_path / "a study", {"a": {}}, lambda arm, seed: 2.0)
    with pytest.raises(ValueError, match=r"must be the only folder of a report: .* '.*/a study'/\*/seed\*$"):
        arms.load([study, a])
    config = json.loads((study / "a/seed2/config.json").read_text())
    (study / "a/seed2/config.json").write_text(json.dumps(config | {"learning_rate": 0.5}))
    with pytest.raises(ValueError, match="must differ only in the seed, but they differ in learning_rate"):
        arms.load([study])


def test_unfinished_runs_count_nowhere_and_are_listed(tmp_path):
    study = write_study(tmp_path / "study", {"a": {}, "b": REDUCED}, lambda arm, seed: 2.0, missing={("b", 3)})
    (study / "b/seed2/summary.json").unlink()
    results = arms.load([study])
    assert [len(cell.runs) for cell in results.cells] == [3, 1]
    assert results.unfinished == [(study / "b/seed2", "stopped, step 40 of 40"), (study / "b/seed3", "not started")]


def test_arms_are_compared_with_their_controls_and_only_at_one_objective(tmp_path):
    encoder = dict(causal=False, objective="mlm", vocab_size=65)
    kinds = {"a": {}, "a2": REDUCED, "e": encoder, "e2": encoder | REDUCED}
    study = write_study(tmp_path / "s", kinds, lambda arm, seed: 2.0, control={"a2": "a", "e2": "e"})
    assert [(a.arm, b.arm) for a, b in arms.load([study]).best_pairs] == [("a2", "a"), ("e2", "e")]
    assert [(a.arm, b.arm) for a, b in arms.load([study], control="a").best_pairs] == [("a2", "a")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two arms at two widths and three learning rates; the best rate is 0.01 at width 16, and an edge at width 32."""

    def loss(arm, seed, n_embd, learning_rate):
        best = {16: 0.01, 32: 0.005}[n_embd]
        return 2 + (arm == "b") / 10 - n_embd / 100 + abs(np.log(learning_rate / best)) / 10 + seed / 1000

    values = {"n_embd": [16, 32], "learning_rate": [0.005, 0.01, 0.02]}
    return write_study(tmp_path_factory.mktemp("grid") / "s", {"a": {}, "b": REDUCED}, loss, values)


def test_the_best_point_is_chosen_for_each_arm_and_size(grid):
    results = arms.load([grid])
    assert (results.size_fields, results.tuned_fields) == (["n_embd"], ["learning_rate"])
    best = [(cell.arm, *cell.point.values()) for cell in results.best]
    assert best == [("a", 16, 0.01), ("b", 16, 0.01), ("a", 32, 0.005), ("b", 32, 0.005)]
    assert [(a.arm, b.arm, a.point == b.point) for a, b in results.best_pairs] == [("b", "a", True)] * 2
    assert [results.at_the_edge(cell) for cell in results.best] == [[], [], ["learning_rate"], ["learning_rate"]]
    assert len(results.point_pairs) == 6


def test_training_steps_are_a_size_and_not_tuned(tmp_path):
    study = write_study(
        tmp_path / "s",
        {"a": {}, "b": REDUCED},
        lambda arm, seed, max_iters: 3 - max_iters / 100,
        {"max_iters": [20, 40]},
    )
    results = arms.load([study])
    assert (results.size_fields, results.tuned_fields) == (["max_iters"], [])
    assert len(results.best_pairs) == 2
    assert not any(results.at_the_edge(cell) for cell in results.best)


def test_zero_is_no_edge(tmp_path):
    study = write_study(
        tmp_path / "s", {"a": {}}, lambda arm, seed, weight_decay: 2 + weight_decay, {"weight_decay": [0.1, 0, 0.01]}
    )
    results = arms.load([study])
    assert results.best[0].point == {"weight_decay": 0}
    assert results.at_the_edge(results.best[0]) == []


def test_the_best_point_is_chosen_by_the_seeds_that_all_points_have(tmp_path):
    """A seed makes the loss higher or lower at all points, so a point that lacks it must not win or lose by that."""
    rates = [0.001, 0.002, 0.004]
    study = write_study(
        tmp_path / "s",
        {"a": {}},
        lambda arm, seed, learning_rate: 2 + {1: 0.0, 2: -0.5, 3: 0.5}[seed] + abs(learning_rate - 0.002),
        {"learning_rate": rates},
    )
    for missing in ([], [(0.001, 3)], [(0.002, 2)], [(0.002, 2), (0.004, 2), (0.001, 3)]):
        results = arms.load([study])
        for rate, seed in missing:
            del results.cells[rates.index(rate)].runs[seed, seed]
        assert results.best[0].point == {"learning_rate": 0.002}
        seeds = {1, 2, 3} - {seed for _, seed in missing}
        left_out = results.leave_one_out_losses(results.best[0])
        assert {seed for seed, _ in left_out} == (seeds if len(seeds) > 1 else set())
    for cell in results.cells:
        del cell.runs[1, 1]
    assert arms.lowest(results.cells) is results.cells[0]  # no seed is at all points


def test_a_point_with_a_diverged_run_is_no_candidate_and_takes_no_seed_from_the_others(tmp_path):
    rates = [0.001, 0.002, 0.004]
    study = write_study(
        tmp_path / "s", {"a": {}}, lambda arm, seed, learning_rate: 3 - 100 * learning_rate, {"learning_rate": rates}
    )
    for seed in (2, 3):
        run = study / f"a,learning_rate=0.004/seed{seed}"
        (run / "summary.json").rename(run / "nonfinite.json")
    results = arms.load([study])
    (best,) = results.best
    assert best.point == {"learning_rate": 0.002}
    assert results.at_the_edge(best) == []
    assert len(results.leave_one_out_losses(best)) == 3
    assert [cell.n_diverged for cell in results.all_cells] == [0, 0, 2]


def test_two_precisions_are_not_one_arm(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed, 2.0) for seed in (1, 2)]
    path = folders[1] / "run.json"
    path.write_text(path.read_text().replace("float32", "bfloat16"))
    with pytest.raises(ValueError, match=r"a1 was trained in float32 and .*a2 in bfloat16"):
        arms.load(folders)
    facts = json.loads(path.read_text()) | {"segments": [{"dtype": "float32"}, {"dtype": "bfloat16"}]}
    path.write_text(json.dumps(facts))  # resumed in another
    with pytest.raises(ValueError, match=r"a2 in float32, bfloat16"):
        arms.load(folders)


def test_a_size_is_one_before_its_second_value_is_finished(tmp_path):
    study = write_study(tmp_path / "s", {"a": {}}, lambda arm, seed, n_embd: 2.0, {"n_embd": [16, 32]})
    for path in study.glob("*=32/*/summary.json"):
        path.unlink()
    results = arms.load([study])
    assert (results.size_fields, results.tuned_fields) == (["n_embd"], [])


def test_the_edge_is_that_of_the_numbers(tmp_path):
    study = write_study(
        tmp_path / "s",
        {"a": {}},
        lambda arm, seed, weight_decay_attn: 2 + (1 if weight_decay_attn is None else weight_decay_attn),
        {"weight_decay_attn": [None, 0.01, 0.1]},
    )
    results = arms.load([study])
    assert results.at_the_edge(results.best[0]) == ["weight_decay_attn"]


def test_leave_one_out_losses_had_no_part_in_the_choice(tmp_path):
    # Pure noise: the lowest of many points looks better than it is, the left-out losses do not.
    generator = np.random.default_rng(0)
    study = write_study(
        tmp_path / "s",
        {"a": {}},
        lambda arm, seed, learning_rate: generator.normal(2, 0.1),
        {"learning_rate": [0.001 * i for i in range(1, 31)]},
        seeds=(1, 2, 3, 4),
    )
    results = arms.load([study])
    (best,) = results.best
    assert np.mean(list(best.losses.values())) < 1.93
    left_out = results.leave_one_out_losses(best)
    for seed, loss in left_out.items():
        cells = results.cells
        means = [np.mean([value for other, value in cell.losses.items() if other != seed]) for cell in cells]
        assert loss == cells[int(np.argmin(means))].losses[seed]
    assert abs(np.mean(list(left_out.values())) - 2) < 0.15


def test_a_curve_has_the_steps_of_all_its_seeds(tmp_path):
    study = write_study(tmp_path / "s", {"a": REDUCED}, lambda arm, seed: 2.0 + seed, diagnostics=True)
    path = study / "a/seed2/metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"step": 20' not in line))
    cell = arms.load([study]).cells[0]
    steps, losses = cell.curve("eval", "val_loss", seeds=[(3, 3), (1, 1)])
    assert steps.tolist() == [0, 20, 40]
    assert losses[:, -1].tolist() == [5.0, 3.0]
    steps, losses = cell.curve("eval", "val_loss")
    assert steps.tolist() == [0, 40]
    steps, norms = cell.curve("diagnostics", "W_Q_norm")
    assert norms.shape == (3, 2, 2)
    assert np.isnan(norms).all()
    assert cell.curve("diagnostics", "grad_norm")[0].tolist() == [40]  # null before the first step


def test_the_intervals_of_a_study_cover_its_difference_in_95_percent_of_trials(tmp_path):
    folder = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, lambda arm, seed: 2.0, seeds=(1, 2, 3, 4))
    results = arms.load([folder])
    generator, covered = np.random.default_rng(5), 0
    for _ in range(2000):
        shared = generator.normal(2.0, 0.05, 5)
        for cell in results.cells:
            for run in cell.runs.values():
                shift = 0.01 if cell.arm == "b" else 0.0
                run.summary["val_loss"] = shared[run.config["seed"]] + shift + generator.normal(0, 0.004)
        ((cell, control),) = results.best_pairs
        found = comparison.difference(cell.losses, control.losses)
        covered += found.low <= 0.01 <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_a_run_without_a_step_is_compared_with_a_trained_one(tmp_path):
    folders = [write_run(tmp_path / "none", 1, 4.0, max_iters=0, warmup_iters=0), write_run(tmp_path / "some", 1, 2.0)]
    ((cell, control),) = arms.load(folders).best_pairs
    assert options.mismatches(cell, control) == ["training tokens against none"]
    assert options.mismatches(control, cell) == ["0 × the training tokens"]
