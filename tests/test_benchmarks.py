"""lm_eval's results in run folders stand in a report beside the losses, paired by seed."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from run_folders import REDUCED, write_study

import report
from studies import benchmarks

ARMS = {"baseline": dict(), "reduced": REDUCED}
VALUES = {"baseline": (0.30, 0.34, 0.31), "reduced": (0.27, 0.33, 0.29)}


def write_results(run, name="results_2026-01-02.json", **metrics):
    """Write a file as lm_eval does; metrics: task -> {name: value}."""
    folder = Path(run, "eval")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"results": metrics, "config": {"model": "wq"}}))


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_study("out/study", ARMS, lambda arm, seed: 2.0 + seed / 100)


def rows(text):
    """The cells of the rows of the table of benchmarks."""
    table = text.partition("## Benchmarks")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "tasky" in line]


def test_values_and_paired_differences(study, command):
    for arm, values in VALUES.items():
        for seed, value in enumerate(values, start=1):
            run = study / arm / f"seed{seed}"
            metrics = {"alias": "tasky", "acc,none": value, "acc_stderr,none": 0.01, "sample_len": 7}
            write_results(run, tasky=metrics | {"em,first": 0.5})
            write_results(run, "results_2026-01-01.json", tasky={"acc,none": 0.9})  # an older one
    status, _, error = command(report.main, study)
    assert status == 0, error
    found = {(metric, arm): values for _, metric, arm, *values in rows((study / "report/report.md").read_text())}
    assert found.keys() == {(metric, arm) for metric in ("acc", "em,first") for arm in ARMS}
    differences = np.subtract(VALUES["reduced"], VALUES["baseline"])
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(differences)
    assert found["acc", "baseline"][:2] == ["3", f"{np.mean(VALUES['baseline']):.4f} ± 0.0517"]
    assert found["acc", "reduced"][2] == f"−{-differences.mean():.4f} ± {half:.4f}"
    p = 2 * scipy.stats.t.sf(abs(differences.mean()) / scipy.stats.sem(differences), 2)
    assert float(found["acc", "reduced"][3]) == pytest.approx(2 * p, rel=0.1)  # of two comparisons


def test_a_report_without_results_has_no_such_section(study, command):
    assert command(report.main, study)[0] == 0
    assert "Benchmarks" not in (study / "report/report.md").read_text()


def test_seeds_without_results_are_left_out(study, command):
    write_results(study / "baseline/seed1", tasky={"acc,none": 0.25})
    write_results(study / "reduced/seed1", tasky={"acc,none": 0.2})
    write_results(study / "reduced/seed2", tasky={"acc,none": 0.3})
    assert command(report.main, study)[0] == 0
    found = {arm: values for _, _, arm, *values in rows((study / "report/report.md").read_text())}
    assert found["baseline"] == ["1", "0.2500", "–", "–"]
    assert found["reduced"][0] == "2"
    assert found["reduced"][2:] == ["−0.0500", "–"]


@pytest.mark.parametrize("content", ['{"results": [1]}', '{"results": {"tasky": 3}}', "{}", "[]", "{"])
def test_another_program_s_file_is_refused(study, refuses, content):
    Path(study, "reduced/seed2/eval").mkdir()
    Path(study, "reduced/seed2/eval/x.json").write_text(content)
    refuses(report.main, study, words=["reduced/seed2/eval/x.json"])
    assert benchmarks.read(study / "reduced/seed1") == {}
