"""The report that report.py writes: its numbers, its files, its figures' data, and its command."""

import base64
import csv
import datetime
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from markdown_it import MarkdownIt
from run_folders import REDUCED, write_run, write_study
from scipy import stats

import report
import train
from engine.flops import cost
from studies import arms, figures, page, point_figures


def cells(text):
    """The rows of a Markdown table, each a dict of its columns."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def tables(text):
    """The Markdown tables of a document."""
    return [cells(block) for block in text.split("\n\n") if block.startswith("| ")]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summaries(folder, arm):
    """The final losses of an arm, in the order of the seeds, read without the code under test."""
    paths = sorted(Path(folder, arm).glob("seed*/summary.json"))
    return np.array([json.loads(path.read_text())["val_loss"] for path in paths])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three arms and four seeds, one with a control of its own, and its report."""
    generator = np.random.default_rng(3)
    shift = {"base": 0.0, "reduced": 0.03, "narrow": 0.001}
    folder = write_study(
        tmp_path_factory.mktemp("study") / "three",
        {"base": {}, "reduced": REDUCED, "narrow": dict(n_embd=8)},
        lambda arm, seed: 2 + seed / 10 + shift[arm] + generator.normal(0, 0.004),
        seeds=(1, 2, 3, 4),
        diagnostics=True,
    )
    report.write_report(report.ReportConfig(runs=(str(folder),)))
    return folder


def test_the_numbers_are_those_of_the_run_folders(study):
    text = (study / "report/report.md").read_text()
    arm_table, difference_table, _ = tables(text)
    control = summaries(study, "base")
    rows = {row["arm"]: row for row in read_csv(study / "report/comparison.csv")}
    p_values = {arm: stats.ttest_rel(summaries(study, arm), control).pvalue for arm in ("reduced", "narrow")}
    for row in arm_table:
        losses = summaries(study, row["arm"])
        reach = stats.t.ppf(0.975, 3) * losses.std(ddof=1) / 2
        assert row["validation loss (mean ± 95 %)"] == f"{losses.mean():.4f} ± {reach:.4f}"
        assert row["seeds"] == "4"
    for row in difference_table:
        d = summaries(study, row["arm"]) - control
        low, high = stats.t.interval(0.95, 3, d.mean(), d.std(ddof=1) / 2)
        found = {name: float(rows[row["arm"]][name]) for name in ("mean", "sd", "low", "high", "p", "p_holm")}
        assert found["mean"] == pytest.approx(d.mean())
        assert found["sd"] == pytest.approx(d.std(ddof=1))
        assert (found["low"], found["high"]) == pytest.approx((low, high))
        assert found["p"] == pytest.approx(p_values[row["arm"]])
        smaller = p_values[row["arm"]] == min(p_values.values())
        assert found["p_holm"] == pytest.approx(
            2 * found["p"] if smaller else max(found["p"], 2 * min(p_values.values()))
        )
        assert row["difference"] == f"{d.mean():+.4f}".replace("-", "−")
        assert row["95 % interval"] == f"{low:+.4f} to {high:+.4f}".replace("-", "−")
        assert row["verdict"] == rows[row["arm"]]["verdict"].partition(";")[0]
    assert rows["reduced"]["verdict"] == "worse"
    assert rows["narrow"]["verdict"].startswith("4 seeds are not enough to call it; ")
    assert f"(the noise floor): {control.std(ddof=1):.4f} for base." in text
    runs = {(row["arm"], row["seed"]): row for row in read_csv(study / "report/runs.csv")}
    assert len(runs) == 12
    assert float(runs["reduced", "2"]["val_loss"]) == pytest.approx(summaries(study, "reduced")[1], rel=1e-7)
    assert float(runs["base", "1"]["training_flops"]) == 40 * 128 * cost(train.TrainConfig(**TINY)).training_flops
    for path in (study / "report/runs.csv", study / "report/comparison.csv"):
        numbers = re.findall(r"(?<![\w.])-?[0-9.]+(?:e-?\d+)?(?![\w.])", path.read_text())
        assert max(len(number.strip("-0.").partition("e")[0]) for number in numbers if "." in number) <= 9


class Texts(HTMLParser):
    """The texts of a page, and what it refers to."""

    def __init__(self):
        super().__init__()
        self.texts, self.references = [], []

    def handle_data(self, data):
        self.texts.append(data.strip())

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_is_the_markdown_in_one_file(study):
    markdown = (study / "report/report.md").read_text()
    parser = Texts()
    parser.feed((study / "report/report.html").read_text())
    for row in (row for table in tables(markdown) for row in table):
        assert {*row, *row.values()} <= set(parser.texts)
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown)
    assert names == ["loss.png", "cost.png", "diagnostics-reduced.png", "diagnostics-narrow.png"]
    pictures = [base64.b64decode(reference.removeprefix("data:image/png;base64,")) for reference in parser.references]
    assert pictures == [(study / "report" / name).read_bytes() for name in names]


def test_text_is_only_text():
    content = [page.Table(["a<b", "c"], [["x|y", "<script>"]]), page.Paragraph("1 < 2 & 3")]
    assert page.Figure("f.png", "At rate 0.5. More.").markdown() == "![At rate 0.5](f.png)\n\nAt rate 0.5. More."
    assert "x\\|y" in page.markdown(content)
    html = page.web_page(content, "<title>", ".")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "1 &lt; 2 &amp; 3" in html


def drawn_lines(monkeypatch):
    """label -> (x, y) of each labelled line that is drawn from now on."""
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def record(self, x, y, *args, **style):
        drawn[style.get("label", len(drawn))] = (np.asarray(x), np.asarray(y))
        return plot(self, x, y, *args, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return drawn


def test_curves_are_means_over_the_seeds_against_tokens(study, monkeypatch, tmp_path):
    drawn = drawn_lines(monkeypatch)
    assert figures.curves(arms.load([study]), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for arm in ("base", "reduced", "narrow"):
        tokens, losses = drawn[arm]
        assert tokens == pytest.approx(np.array([0, 20, 40]) * 128 / 1e6)
        assert losses == pytest.approx(summaries(study, arm).mean() + np.array([2, 1, 0]))


def test_differences_are_paired(study):
    results = arms.load([study])
    cell, control = results.best_pairs[0]
    del cell.runs[2, 2]
    tokens, values = figures.difference(cell, control)
    a, b = (np.delete(summaries(study, arm), 1)[:, None] + [2, 1, 0] for arm in ("reduced", "base"))
    assert tokens.tolist() == [0, 20 * 128, 40 * 128]
    assert values == pytest.approx(a - b)


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """Studies over one field, with zero, and over two; and of one seed."""
    folder = tmp_path_factory.mktemp("grids")
    pair = {"base": {}, "reduced": REDUCED | {"weight_decay": 0.1}}

    def loss(arm, seed, weight_decay, attn_scale=1.0):
        best, level = (0.0, 2.0) if arm == "base" else (0.1, 2.05)
        return level + abs(weight_decay - best) + abs(np.log2(attn_scale)) / 10 + seed / 100

    decay, scale = {"weight_decay": [0.0, 0.01, 0.1]}, {"attn_scale": [0.5, 1.0, 2.0]}
    return {
        "one": write_study(folder / "one", pair, loss, decay),
        "two": write_study(folder / "two", pair, loss, decay | scale),
        "seed": write_study(folder / "seed", pair, lambda arm, seed: 2.0, seeds=(1,)),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", {"loss.png", "grid.png"}),
        ("two", {"loss.png", "heat_map.png"}),
        ("seed", {"loss.png"}),
    ],
)
def test_only_what_there_is_is_drawn(grids, name, expected):
    folder, _, _ = report.write_report(report.ReportConfig(runs=(str(grids[name]),)))
    assert {path.name for path in folder.glob("*.png")} == expected


def test_the_grid_is_reported_point_by_point_with_its_optima(grids, tmp_path):
    folder, table, headlines = report.write_report(
        report.ReportConfig(runs=(str(grids["one"]),), out_dir=str(tmp_path))
    )
    text = (folder / "report.md").read_text()
    assert [row[0] for row in table.rows] == ["base (weight_decay 0)", "reduced (weight_decay 0.1)"]
    assert "base is best at weight_decay 0.\n" in text
    assert "reduced is best at weight_decay 0.1. Warning: weight_decay is at the edge of the grid" in text
    points = next(rows for rows in tables(text) if "weight_decay" in rows[0])
    assert len(points) == 6
    by_point = {(row["arm"], row["weight_decay"]): row for row in points}
    assert by_point["reduced", "0"]["difference at this point (± 95 %)"] == "+0.1500 ± 0.0000"
    assert by_point["base", "0"]["validation loss (± 95 %)"].endswith("(best)")
    assert headlines[0].startswith("At each arm's best weight decay, reduced")
    best = "weight_decay 0 for base; weight_decay 0.1 for reduced"
    assert headlines[1:] == [f"Best of 3 points, chosen by these same losses: {best}."]
    kinds = [row["compared"] for row in read_csv(folder / "comparison.csv")]
    assert kinds == ["best", "points chosen by the other seeds"] + 3 * ["same point"]


def test_one_seed_gets_no_interval(grids):
    folder, table, verdicts = report.write_report(report.ReportConfig(runs=(str(grids["seed"]),)))
    assert [row[1] for row in table.rows] == ["2.0000", "2.0000"]
    assert verdicts == ["Inconclusive: one seed. reduced is as good as base."]
    assert "±" not in table.markdown()
    assert read_csv(folder / "comparison.csv")[0]["p"] == ""


def test_a_heat_map_shows_the_means_on_one_scale(grids, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    images, imshow = [], Axes.imshow

    def record(self, table, **style):
        images.append((table, style["vmin"], style["vmax"]))
        return imshow(self, table, **style)

    monkeypatch.setattr(Axes, "imshow", record)
    assert point_figures.heat_maps(arms.load([grids["two"]]), tmp_path / "map.png")
    (base, *scale), (reduced, *same_scale) = images
    assert scale == same_scale
    assert base == pytest.approx(2.02 + np.array([[0.0], [0.01], [0.1]]) + np.array([0.1, 0, 0.1]))
    assert reduced == pytest.approx(2.07 + np.array([[0.1], [0.09], [0.0]]) + np.array([0.1, 0, 0.1]))


def test_diagnostics_of_two_arms_share_their_axes(study, monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    seen, plot = [], Axes.plot

    def record(self, x, y, **style):
        seen.append((self, np.asarray(y)))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record)
    results = arms.load([study])
    (cell, control), _ = results.best_pairs
    for run in cell.runs.values():  # so that axes of their own would differ
        next(r for r in run.metrics if r["kind"] == "diagnostics")["attn_logit_max"] = [-50.0, -50.0]
    assert figures.diagnostics(cell, control, tmp_path / "d.png")
    specs = [(panel.get_subplotspec(), panel, y) for panel, y in seen if len(y)]
    layers = [(spec.rowspan.start, spec.colspan.start, y) for spec, _, y in specs]
    # Two layers each of: the largest logit; ‖W_Q‖, of the control alone; the gradient, from the first step on.
    panels = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert [(row, column) for row, column, _ in layers] == [panel for panel in panels for _ in range(2)]
    limits = {(spec.rowspan.start, spec.colspan.start): panel.get_ylim() for spec, panel, _ in specs}
    assert limits[0, 0] == limits[0, 1]
    assert layers[1][2].tolist() == [3.5, 23.5, 43.5]
    assert layers[-1][2].tolist() == [23.5, 43.5]


@pytest.fixture
def runs(tiny):
    train.train(tiny(out_dir="a", **REDUCED))
    train.train(tiny(out_dir="b"))
    return ["a", "b"]


def test_runs_of_the_trainer_are_reported(runs, command):
    Path("b/summary.json").rename("kept.json")
    status, out, _ = command(report.main, *runs, "--out_dir=compared")
    assert status == 0
    assert [row["arm"] for row in cells(out.split("\n\n")[0])] == ["a"]
    assert "b: not finished, step 40 of 40" in Path("compared/report.md").read_text()
    Path("kept.json").rename("b/summary.json")
    status, out, _ = command(report.main, *runs, "--control=b", "--out_dir=compared")
    table = out.split("\n\n")[0]
    assert table in Path("compared/report.md").read_text()
    for row, folder in zip(cells(table), runs, strict=True):
        summary = json.loads(Path(folder, "summary.json").read_text())
        assert row["validation loss"] == f"{summary['val_loss']:.4f}"
        assert row["tokens"] == "0.005M"
    a, b = cells(table)
    own = "wq_identity, attn_scale 0.5, weight_decay 0.03125"
    assert (a["options"], a["scale"], a["weight decay"]) == (own, "0.5/√8", "0.03125")
    assert (b["options"], b["scale"], b["weight decay"]) == ("–", "1/√8", "0.1")
    assert a["date"] == b["date"] == datetime.date.today().isoformat()
    assert float(b["attn + MLP"][:-1]) - float(a["attn + MLP"][:-1]) == pytest.approx(2 * 16 * 16 / 1e6, abs=1e-3)
    assert "- Inconclusive: one seed. a is 0." in out


def test_a_run_of_one_window_and_no_step_has_no_error_and_no_speed(tiny, command):
    train.train(tiny(out_dir="short", max_iters=0, block_size=300, tokens_per_step=2400))
    assert command(report.main, "short")[0] == 0
    _, runs = tables(Path("out/report/report.md").read_text())
    assert float(runs[0]["validation loss"]) > 0
    assert runs[0]["tokens/s"] == "–"


@pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib, about names that it cannot show
def test_names_that_markdown_and_matplotlib_would_interpret_are_only_names(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    names = ["_a|b`c`*d*$e$", "line\nfeed $x_y$ (1)", "line-feed $x_y$-(1)", "bytes \udcff_", "long" * 60]
    for number, name in enumerate(names):
        Path("out", name).mkdir(parents=True)
        for seed in (1, 2):
            fields = dict(n_embd=16 * (1 + number), diagnostics=True)
            run = write_run(Path("new"), seed, 2.0 + number + seed / 10 + number * seed**2 / 100, **fields)
            run.rename(Path("out", name, f"seed{seed}"))
    code, out, _ = command(report.main, *(f"out/{name}/seed{seed}" for name in names for seed in (1, 2)))
    assert code == 0
    shown = [names[0], "line feed $x_y$ (1)", names[2], "bytes", names[4]]
    markdown = Path("out/report/report.md").read_text()
    assert out.split("\n\n")[0] in markdown
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    for html in (rendered, Path("out/report/report.html").read_text()):
        parser = Texts()
        parser.feed(html)
        assert {*shown} <= {*parser.texts}
        assert len(parser.references) == len(list(Path("out/report").glob("*.png"))) == 3 + 4
    assert len({*re.findall(r"\]\((.+?\.png)\)", markdown)}) == 7
    assert [row["arm"] for row in read_csv("out/report/runs.csv")][::2] == shown


def test_mistakes_end_in_one_line(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(report.main, words=["python report.py out/"])
    refuses(report.main, "nowhere", words=["nowhere", "config.json"])
    refuses(report.main, "nowhere", "--outdir=x", words=["did you mean out_dir?"])
    write_run(tmp_path / "a", 1, 2.0)
    refuses(report.main, "a", "a", words=["both have seed 1", "must have each seed once"])
    refuses(report.main, "a", "--control=b", words=["control must be an arm with a finished run (one of a), got 'b'"])
