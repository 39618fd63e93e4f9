import json
from pathlib import Path

import pytest

import report
import train


@pytest.fixture
def runs(tiny):
    train.train(tiny(out_dir="a", attn_scale=0.5, wq_identity=True, weight_decay=2**-5))
    train.train(tiny(out_dir="b"))
    return ["a", "b"]


def cells(text):
    """The rows of a Markdown table, each a dict of its columns."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_table_says_what_the_run_folders_say(runs, command):
    status, out, _ = command(report.main, *runs, "--out_dir=compared")
    assert status == 0
    table = Path("compared/report.md").read_text().split("\n\n")[0]
    assert out.startswith(table)
    for row, folder in zip(cells(table), runs, strict=True):
        summary = json.loads(Path(folder, "summary.json").read_text())
        assert row["run"] == folder
        assert row["validation loss"] == f"{summary['val_loss']:.4f} ± {summary['val_loss_se']:.4f}"
        assert row["steps"] == "40"
    a, b = cells(table)
    assert (a["W_Q"], a["scale"], a["weight decay"]) == ("I", "0.5/√8", "0.03125")
    assert (b["W_Q"], b["scale"], b["weight decay"]) == ("trained", "1/√8", "0.1")
    assert float(b["attn + MLP"][:-1]) - float(a["attn + MLP"][:-1]) == pytest.approx(2 * 16 * 16 / 1e6, abs=1e-3)


def test_the_figure_shows_every_evaluation(runs, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def record(self, x, y, **style):
        if "label" in style:
            drawn[style["label"]] = (x, y)
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record)
    report.draw([report.load_run(folder) for folder in runs], "loss.png")
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    for folder in runs:
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        evaluations = [r for r in records if r["kind"] == "eval"]
        tokens, losses = drawn[folder]
        assert tokens == pytest.approx([r["step"] * 128 / 1e6 for r in evaluations])
        assert losses == [r["val_loss"] for r in evaluations]


def test_an_unfinished_run_is_marked(runs):
    Path("a/summary.json").unlink()
    assert "(unfinished)" in cells(report.table([report.load_run("a")]))[0]["validation loss"]


def test_a_run_of_one_window_and_no_step_has_no_error_and_no_speed(tiny):
    train.train(tiny(out_dir="short", max_iters=0, block_size=300, tokens_per_step=2400))
    (row,) = cells(report.table([report.load_run("short")]))
    assert float(row["validation loss"]) > 0
    assert row["tokens/s"] == "–"


def test_mistakes_end_in_one_line(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(report.main, words=["python report.py out/"])
    refuses(report.main, "nowhere", words=["nowhere", "config.json"])
    refuses(report.main, "nowhere", "--outdir=x", words=["did you mean out_dir?"])
