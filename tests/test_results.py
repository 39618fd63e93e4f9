"""What results/ holds is what its packed runs give, and what other files quote of it is what it says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_folders import REDUCED, write_run, write_study

import report
from configurator import ROOT
from studies import blocks, packed

PACKED = sorted(path.parent for path in ROOT.glob(f"results/*/{packed.NAME}"))
TEXTS = ("report.md", "runs.csv", "comparison.csv")


def write(*runs, out_dir, **options):
    return report.write_report(report.ReportConfig(runs=tuple(map(str, runs)), out_dir=str(out_dir), **options))[0]


def pixels(path):
    """A PNG as an array from 0 to 1."""
    import matplotlib.image

    return matplotlib.image.imread(path)


@pytest.mark.parametrize("folder", PACKED, ids=lambda folder: folder.name)
def test_committed_reports_are_those_of_their_runs(folder, tmp_path):
    again = write(folder, out_dir=tmp_path)
    for name in TEXTS:
        assert (again / name).read_text() == (folder / name).read_text(), f"{name}: run make results"
    names = {path.name for path in folder.glob("*.png")}
    assert names == {path.name for path in again.glob("*.png")}
    for name in names:
        ours, theirs = pixels(folder / name), pixels(again / name)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).mean() < 0.01, f"{name}: run make results"


def test_some_results_are_packed():
    assert PACKED


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_tables_in_other_files_are_those_of_the_reports(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert blocks.renewed(text, ROOT) == text, "run make results"


def test_a_report_can_be_written_from_a_packed_study_alone(tmp_path):
    generator = np.random.default_rng(0)
    folder = write_study(
        tmp_path / "study",
        {"a": {}, "b": REDUCED},
        lambda arm, seed, learning_rate: 2 + seed / 10 + generator.normal(0, 0.01),
        {"learning_rate": [0.001, 0.002]},
        diagnostics=True,
        missing={("b", 3)},
    )
    run = folder / "a,learning_rate=0.002/seed2"
    (run / "summary.json").rename(run / "nonfinite.json")
    before = write(folder, out_dir=tmp_path / "before")
    kept = write(folder, out_dir=tmp_path / "kept", pack=True)
    shutil.rmtree(folder)
    assert (kept / packed.NAME).stat().st_size < 6000
    for name in (*TEXTS, "report.html"):
        (kept / name).unlink()
    assert write(kept, out_dir=kept) == kept
    for name in TEXTS:
        assert (kept / name).read_text() == (before / name).read_text()
    assert "a,learning_rate=0.002/seed2: diverged, step 40 of 40" in (kept / "report.md").read_text()
    figures = sorted(path.name for path in before.glob("*.png"))
    assert len(figures) == 3 and figures == sorted(path.name for path in kept.glob("*.png"))
    for name in figures:
        assert np.abs(pixels(before / name) - pixels(kept / name)).mean() < 1e-3


def test_a_report_can_be_written_from_packed_run_folders_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write_run(f"out/base/seed{seed}", seed, 2.0 + seed / 7)
        write_run(f"out/red/seed{seed}", seed, 2.1 + seed / 9, **REDUCED)
    write_run("out/red/seed3", 3, 2.0, finished=False, **REDUCED)
    runs = [f"out/{arm}/seed{seed}" for arm, seeds in (("red", (1, 2, 3)), ("base", (1, 2))) for seed in seeds]
    before = write(*runs, out_dir="before", control="base")
    write(*runs, out_dir="kept", control="base", pack=True)
    shutil.rmtree("out")
    kept = write("kept", out_dir="again", control="base")
    for name in TEXTS:
        assert (kept / name).read_text() == (before / name).read_text()
    assert "out/red/seed3: not finished, step 40 of 40" in (kept / "report.md").read_text()
    with pytest.raises(ValueError, match="kept holds the runs of a report"):
        write("kept", "before", out_dir="x")
    Path("kept", packed.NAME).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"kept/runs.json.xz is not a file that report.py --pack wrote"):
        write("kept", out_dir="x")


def test_numbers_are_kept_as_far_as_a_report_shows_them(tmp_path):
    folder = write_run(tmp_path / "a", 1, 2.123456789, diagnostics=True)
    packed.pack([folder], tmp_path / packed.NAME)
    (again,) = packed.unpack(tmp_path / packed.NAME, tmp_path / "again")
    for name in ("config.json", "run.json", "summary.json"):
        assert json.loads(Path(again, name).read_text()) == json.loads((folder / name).read_text())
    before, after = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (folder, Path(again)))
    assert [(r["step"], r["kind"]) for r in after] == [(r["step"], r["kind"]) for r in before]
    for one, other in zip(before, after, strict=True):
        for key in ("loss", "val_loss", "attn_logit_max"):
            assert other.get(key) == (pytest.approx(one[key], rel=1e-4) if key in one else None)
    assert "tokens_per_second" not in after[1]


REPORT = """# A study

- A verdict.
- Another.

## Arms

| arm | loss | p\\|q |
| --- | ---: | ---: |
| a | 1.5 | 1 |
| b | 2.5 | 2 |

## Notes

Nothing.
"""


def test_a_block_is_the_table_or_the_list_of_a_report(tmp_path):
    (tmp_path / "report.md").write_text(REPORT)
    text = (
        "before\n\n<!-- from report.md | Arms | loss, arm -->\nold\n<!-- end -->\n\n- a list\n\n"
        "  <!-- from report.md -->\n  <!-- end -->\n\nafter\n"
    )
    new = blocks.renewed(text, tmp_path)
    assert new == (
        "before\n\n<!-- from report.md | Arms | loss, arm -->\n| loss | arm |\n| ---: | --- |\n| 1.5 | a |\n"
        "| 2.5 | b |\n<!-- end -->\n\n- a list\n\n  <!-- from report.md -->\n  - A verdict.\n  - Another.\n"
        "  <!-- end -->\n\nafter\n"
    )
    assert blocks.renewed(new, tmp_path) == new
    assert blocks.content(tmp_path / "report.md", "Arms").splitlines()[0] == "| arm | loss | p\\|q |"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other.md | Arms", "cannot read .*other.md"),
        ("report.md | Arm", "has no heading 'Arm'"),
        ("report.md | Notes", "has no table under 'Notes'"),
        ("report.md | Arms | los", "has no column 'los' under 'Arms'; it has arm, loss"),
    ],
)
def test_a_block_of_what_is_not_there_is_refused(tmp_path, what, words):
    (tmp_path / "report.md").write_text(REPORT)
    with pytest.raises(ValueError, match=words):
        blocks.renewed(f"<!-- from {what} -->\n<!-- end -->\n", tmp_path)
