"""Points of a grid that are chosen with other seeds than those that are reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import REDUCED, TWO_ARMS, planned, write_study, write_study_files

import report
import sweep
from studies import arms, sections, store, verdicts
from studies import status as status_of_study

RATES = [0.001, 0.002, 0.004]


def loss(arm, seed, learning_rate):
    """The tuning seeds 1 and 2 find 0.002 best for a, 0.004 for b; the other seeds would find 0.001."""
    best = {"a": 0.002, "b": 0.004}[arm] if seed < 3 else 0.001
    return 2 + abs(learning_rate - best) + (arm == "b") * 0.01 * seed


@pytest.fixture
def study(tmp_path):
    folder = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, loss, {"learning_rate": RATES}, seeds=(1, 2, 3, 4, 5))
    content = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(content | {"tuning_seeds": [1, 2], "equal_within": 0.05}))
    return folder


def test_the_tuning_seeds_choose_and_the_others_are_reported(study):
    results = arms.load([study])
    assert [(cell.arm, cell.point["learning_rate"]) for cell in results.best] == [("a", 0.002), ("b", 0.004)]
    assert [sorted(cell.runs) for cell in results.best] == [[(3, 3), (4, 4), (5, 5)]] * 2
    (found,) = arms.compare_cells(results.best_pairs)
    expected = [loss("b", seed, 0.004) - loss("a", seed, 0.002) for seed in (3, 4, 5)]
    assert found.difference.mean == pytest.approx(np.mean(expected))
    assert results.leave_one_out_losses(results.best[0]) == {}
    text = " ".join(verdicts.headlines(results, [found]))
    assert (
        "chosen by the seeds 1 and 2, which are not among those that are reported: learning_rate 0.002 for a;" in text
    )
    assert "chosen by the losses of other seeds" in sections.tuning_notes(results)[-1]
    rows = {(row[0], row[1]): row[2:4] for row in sections.every_point(results).rows}
    assert rows["a", "0.002"] == ["2", "2.0000 ± 0.0000 (best)"], "the losses by which it was chosen"


def test_reported_seeds_are_missed_at_chosen_points_only(study):
    import shutil

    for rate in RATES:
        shutil.rmtree(study / f"a,learning_rate={rate}/seed4")
    results = arms.load([study])
    assert [(str(folder.relative_to(study)), why) for folder, why in results.unfinished] == [
        ("a,learning_rate=0.002/seed4", "not started")
    ]
    for rate in RATES[::2]:
        for seed in (3, 5):
            shutil.rmtree(study / f"a,learning_rate={rate}/seed{seed}")
    assert len(arms.load([study]).unfinished) == 1
    assert len(sections.every_point(results).rows) == 6
    for seed in (3, 5):
        shutil.rmtree(study / f"a,learning_rate=0.002/seed{seed}")
    results = arms.load([study])
    assert [cell.arm for cell in results.best] == ["b"], "nothing of a is to be reported yet"
    assert report.write_report(report.ReportConfig(runs=(str(study),)))[2][-1] == (
        "b (learning_rate 0.004) is not compared: its control a has no finished run."
    )


def test_a_study_s_file_fixes_seeds_and_margin_before_there_are_results(tmp_path, monkeypatch, tiny):
    text = TWO_ARMS + "seeds = [1, 2, 3]\ntuning_seeds = [1]\nequal_within = 0.005\n"
    _, content = planned(*write_study_files(text))
    assert (content["tuning_seeds"], content["equal_within"]) == ([1], 0.005)
    assert content["about"] == ["wq_identity", "attn_scale"], "what its arms differ in"
    store.write_study("out", content)
    assert store.read_study("out")["about"] == ["wq_identity", "attn_scale"]
    _, content = planned(*write_study_files(text.replace("0.005", "0.01") + "about = ['wq_identity']"))
    assert content["about"] == ["wq_identity"]
    with pytest.raises(ValueError, match=r"out was begun with equal_within=0.005, .* has 0.01 now: set it back"):
        store.write_study("out", content)
    _, content = planned(*write_study_files(text.replace("[1]", "[2]")))
    with pytest.raises(ValueError, match=r"begun with tuning_seeds=\[1\]"):
        store.write_study("out", content)


TUNED = """
arms = {"baseline": "", "reduced": "--wq_identity --attn_scale=0.5"}
control = "baseline"
seeds = [1, 2, 3]
tuning_seeds = [1]
grid = {"learning_rate": [1e-4, 1e-2, 1e-3]}
settings = "--max_iters=12 --eval_interval=12 --warmup_iters=0 --lr_decay_iters=none"
"""


def test_a_sweep_trains_the_reported_seeds_at_the_chosen_points_alone(tiny, forked, command):
    argv = [*write_study_files(TUNED), "--jobs=2", "--out_dir=out"]
    status, text, _ = command(sweep.main, *argv, "--dry_run")
    assert status == 0 and "# all: 10 runs, " in text  # 2 arms: 3 points of seed 1, and one point of the seeds 2 and 3
    assert text.count("only if the tuning seeds choose its point") == 2 * 3 * 2
    status, text, _ = command(sweep.main, *argv)
    assert status == 0 and "all 10 runs are finished" in text
    results = arms.load(["out"])
    chosen = [f"{cell.arm},learning_rate={cell.point['learning_rate']:g}" for cell in results.best]
    assert [sorted(cell.runs) for cell in results.best] == [[(2, 2), (3, 3)]] * 2
    expected = {f"{arm},learning_rate={rate}/seed1" for arm in ("baseline", "reduced") for rate in (1e-4, 1e-2, 1e-3)}
    expected |= {f"{name}/seed{seed}" for name in chosen for seed in (2, 3)}
    assert {str(path.parent.relative_to("out")) for path in Path("out").glob("*/*/summary.json")} == expected
    assert results.unfinished == []
    assert len(status_of_study.rows(Path("out"), store.read_study("out"))) == 10
    status, text, _ = command(sweep.main, *argv, "--dry_run")
    assert "# all: 10 runs, " in text and "# remaining: 0 runs" in text and "only if" not in text
    status, text, _ = command(sweep.main, *argv, "--seeds=4")  # one more, of which the same points are needed
    assert status == 0 and {path.parent.parent.name for path in Path("out").glob("*/seed4/summary.json")} == {*chosen}


def test_a_sweep_whose_tuning_runs_cannot_end_says_what_the_others_wait_for(tiny, forked, command):
    argv = [*write_study_files(TUNED), "--jobs=2", "--out_dir=out"]
    status, text, _ = command(sweep.main, *argv, "--seeds=1", "--array_index=0", "--array_size=3")
    assert status == 0
    status, text, _ = command(sweep.main, *argv, "--array_index=8", "--array_size=9")  # seed 3, at the last point
    assert status == 1 and "2 runs are left, of which the tuning seeds choose some: repeat the command when " in text
    missing = Path(text.split("repeat the command when ")[1].split(" is done")[0])
    assert missing.name == "seed1" and not (missing / "summary.json").exists()
    assert {path.parent.name for path in Path("out").glob("*/*/summary.json")} == {"seed1"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tuning_seeds = [1, 2, 3]", "tuning_seeds must be some of the seeds"),
        ("tuning_seeds = [7]", "tuning_seeds must be some of the seeds"),
        ("equal_within = -1", "equal_within must be a fraction"),
        ("equal_within = 'x'", "equal_within must be"),
        ("about = ['wq_identiy']", "did you mean wq_identity"),
    ],
)
def test_mistakes_name_the_file_and_the_line(tiny, line, words):
    with pytest.raises(ValueError, match=rf"my_study.py, line \d+.*{words}"):
        planned(*write_study_files(TWO_ARMS + line))
