import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from run_folders import write_run, write_study
from scipy import stats

import report
import train
from engine.flops import cost
from studies import arms, comparison, figures, page, sections

REDUCED = dict(wq_identity=True, attn_scale=0.5, weight_decay=2**-5)
PAPER = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dataset="openwebtext")
PAPER |= dict(tokens_per_step=480 * 1024, max_iters=105_000)


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
    report.report(report.ReportConfig(runs=(str(folder),)))
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
        assert row["verdict"] == rows[row["arm"]]["verdict"]
    assert rows["reduced"]["verdict"] == "worse"
    assert rows["narrow"]["verdict"].startswith("not distinguishable with 4 seeds")
    assert f"over seeds: {control.std(ddof=1):.4f} for base." in text
    runs = {(row["arm"], row["seed"]): row for row in read_csv(study / "report/runs.csv")}
    assert len(runs) == 12
    assert float(runs["reduced", "2"]["val_loss"]) == summaries(study, "reduced")[1]
    assert float(runs["base", "1"]["training_flops"]) == 40 * 128 * cost(train.TrainConfig(**TINY)).training_flops


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


def test_relative_differences_are_paired(study):
    results = arms.load([study])
    cell, control = results.best_pairs[0]
    del cell.runs[2, 2]
    tokens, relative = figures.relative_difference(cell, control)
    a, b = (np.delete(summaries(study, arm), 1)[:, None] + [2, 1, 0] for arm in ("reduced", "base"))
    assert tokens.tolist() == [0, 20 * 128, 40 * 128]
    assert relative == pytest.approx((a - b) / b)


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
    folder, _, _ = report.report(report.ReportConfig(runs=(str(grids[name]),)))
    assert {path.name for path in folder.glob("*.png")} == expected


def test_the_grid_is_reported_point_by_point_with_its_optima(grids, tmp_path):
    folder, table, headlines = report.report(report.ReportConfig(runs=(str(grids["one"]),), out_dir=str(tmp_path)))
    text = (folder / "report.md").read_text()
    assert [row[0] for row in table.rows] == ["base (weight_decay 0)", "reduced (weight_decay 0.1)"]
    assert "base is best at weight_decay 0.\n" in text
    assert "reduced is best at weight_decay 0.1. Warning: weight_decay is at the edge of the grid" in text
    points = next(rows for rows in tables(text) if "weight_decay" in rows[0])
    assert len(points) == 6
    by_point = {(row["arm"], row["weight_decay"]): row for row in points}
    assert by_point["reduced", "0"]["difference there (± 95 %)"] == "+0.1500 ± 0.0000"
    assert by_point["base", "0"]["validation loss (± 95 %)"].endswith("(best)")
    assert len(headlines) == 1
    assert headlines[0].startswith("Best of 3 points against best of 3, chosen by these losses: reduced")
    kinds = [row["compared"] for row in read_csv(folder / "comparison.csv")]
    assert kinds == ["best", "points chosen by the other seeds"] + 3 * ["same point"]


def test_one_seed_gets_no_interval(grids):
    folder, table, verdicts = report.report(report.ReportConfig(runs=(str(grids["seed"]),)))
    assert [row[-1] for row in table.rows] == ["2.0000", "2.0000"]
    assert verdicts == ["reduced against base: one seed cannot tell (difference +0.0000)."]
    assert "±" not in table.markdown()
    assert read_csv(folder / "comparison.csv")[0]["p"] == ""


def test_a_heat_map_shows_the_means_on_one_scale(grids, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    images, imshow = [], Axes.imshow

    def record(self, table, **style):
        images.append((table, style["vmin"], style["vmax"]))
        return imshow(self, table, **style)

    monkeypatch.setattr(Axes, "imshow", record)
    assert figures.heat_maps(arms.load([grids["two"]]), tmp_path / "map.png")
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


def test_the_papers_numbers_stand_beside_its_own_setting_alone(tmp_path):
    folders = [
        write_run(tmp_path / "baseline", 1, 2.91, **PAPER),
        write_run(tmp_path / "reduced", 1, 2.89, **PAPER, **REDUCED),
        write_run(tmp_path / "other", 1, 2.89, **PAPER, **REDUCED | {"attn_scale": 1.0}),
    ]
    results = arms.load(folders)
    rows = cells(sections.table_2(results.best).markdown())
    assert [row["paper: loss"] for row in rows] == ["2.90", "2.88", "–"]
    assert [row["paper: parameters"] for row in rows] == ["124M", "117M", "–"]
    assert [row["parameters"] for row in rows] == ["124.4M", "117.3M", "117.3M"]
    assert "OpenWebText" in sections.paper_note(results.best)
    short = write_run(tmp_path / "short", 1, 3.4, **PAPER | {"max_iters": 1000})
    rows = cells(sections.table_2(arms.load([folders[0], short]).best).markdown())
    assert [row["paper: loss"] for row in rows] == ["2.90", "–"]
    short = arms.load([short])
    assert "paper: loss" not in sections.table_2(short.best).head
    assert sections.paper_note(short.best).endswith("another max_iters.")
    assert sections.paper_note(results.best[2:]) is None


def test_each_row_of_weight_decay_is_told():
    config = dict(weight_decay=0.1, weight_decay_attn=0.0, weight_decay_mlp=None, weight_decay_embd=None)
    assert sections.decays(config) == "0 / 0.1 / 0.1"
    assert sections.decays(config | {"weight_decay_attn": 0.1}) == "0.1"


def test_runs_made_in_several_ways_are_told(grids, tmp_path):
    results = arms.load([grids["seed"]])
    results.cells[1].example.facts["device"] = "another"
    assert any(text.startswith("Warning: not all runs have the same device") for text in sections.setting(results))


def sentences(folder):
    """The headlines, and the notes on tuning, of a study folder."""
    results = arms.load([folder])
    comparisons = report.compare(results.best_pairs)
    return sections.headlines(results, comparisons), sections.tuning_notes(results)


def test_a_study_that_is_half_done_says_so_and_has_no_edge(tmp_path):
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
        "a is best at learning_rate 0.002; points without a finished run: 1 of 3, so this is prov"
    )
    assert "Chosen by the seeds that all points have: 1, 2." in notes[0]
    assert not any("edge" in note for note in notes)


def test_a_point_that_diverged_is_told_and_leaves_the_lower_edge_an_edge(tmp_path):
    rates = {"learning_rate": [0.001, 0.002, 0.004]}
    folder = write_study(tmp_path / "s", {"a": {}}, lambda arm, seed, learning_rate: 2 + learning_rate, rates)
    for path in folder.glob("a,learning_rate=0.004/*/summary.json"):
        path.rename(path.with_name("nonfinite.json"))
    _, notes = sentences(folder)
    assert notes[0].startswith("a is best at learning_rate 0.001; points with a run that diverged, which are no candi")
    assert "provisional" not in notes[0] and "at the edge of the grid" in notes[0]


def test_the_arms_own_settings_are_compared_beside_the_best(tmp_path):
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
    (own, best), _ = sentences(folder)
    assert own.startswith("As the arms' own files set them: b (attn_scale 0.5) is worse than a (attn_scale 1) by 0.1")
    assert best.startswith("Best of 2 points against best of 2, chosen by these losses: b (attn_scale 1) is better")


def test_a_difference_that_closes_with_size_is_told(tmp_path):
    generator = np.random.default_rng(1)

    def loss(arm, seed, max_iters):
        gap = 0.1 - 0.02 * np.log2(max_iters / 10)
        return 3 + seed / 10 + (gap if arm == "b" else 0) + generator.normal(0, 1e-3)

    folder = write_study(tmp_path / "s", {"a": {}, "b": REDUCED}, loss, {"max_iters": [10, 20, 40]})
    for seed in (2, 3):
        Path(folder, f"b,max_iters=40/seed{seed}/summary.json").unlink()  # this size has too few seeds yet
    (*_, trend), _ = sentences(folder)
    assert "3 seeds, 2 sizes; 40 left out, with too few seeds): a trend" in trend
    loss_of = {seed: loss("b", seed, 40) for seed in (2, 3)}
    for seed, value in loss_of.items():
        write_run(tmp_path / f"again{seed}", seed, value, **REDUCED, max_iters=40)
        (tmp_path / f"again{seed}/summary.json").rename(folder / f"b,max_iters=40/seed{seed}/summary.json")
    (*_, trend), _ = sentences(folder)
    assert re.match(r"b − a changes by −0\.0(19|20)\d+ a doubling of max_iters .*3 seeds, 3 sizes\): a trend\.", trend)


def test_what_is_not_alike_is_told_beside_the_verdict(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed, 2 + seed / 10) for seed in (1, 2)]
    folders += [write_run(tmp_path / f"b{seed}", seed, 1.9 + seed / 10, max_iters=80, block_size=8) for seed in (1, 2)]
    results = arms.load(folders)
    (verdict,) = sections.verdicts(results.best_pairs, report.compare(results.best_pairs))
    assert verdict.endswith("Warning: the two are not alike: on 2 × the tokens, context 8 against 16.")
    for run in results.cells[1].runs.values():
        run.facts["dtype"] = "bfloat16"
    (verdict,) = sections.verdicts(results.best_pairs, report.compare(results.best_pairs))
    assert verdict.endswith("bfloat16 against float32.")


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


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (1e-5, "< 0.0001"), (0.04991, "0.0499"), (0.0503, "0.0503"), (0.234, "0.23")]
)
def test_a_p_value_near_the_level_has_more_digits(p, text):
    assert sections.p_text(p) == text


def test_diverged_runs_are_counted_apart_from_what_is_still_to_come(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed, 2.0, finished=seed < 3) for seed in (1, 2, 3, 4)]
    (folders[3] / "nonfinite.json").write_text("{}")
    results = arms.load(folders)
    assert [why for _, why in results.unfinished] == ["not finished, step 40 of 40", "diverged, step 40 of 40"]
    text = " ".join(sections.setting(results))
    assert "Runs that diverged, and are in no number here: 1." in text and "Runs that are not finished: 1." in text


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
    assert (a["trainable"], a["scale"], a["weight decay"]) == ("W_K W_V W_O", "0.5/√8", "0.03125")
    assert (b["trainable"], b["scale"], b["weight decay"]) == ("W_Q W_K W_V W_O", "1/√8", "0.1")
    assert float(b["attn + MLP"][:-1]) - float(a["attn + MLP"][:-1]) == pytest.approx(2 * 16 * 16 / 1e6, abs=1e-3)
    assert "- a against b: one seed cannot tell" in out


def test_a_run_of_one_window_and_no_step_has_no_error_and_no_speed(tiny, command):
    train.train(tiny(out_dir="short", max_iters=0, block_size=300, tokens_per_step=2400))
    assert command(report.main, "short")[0] == 0
    _, runs = tables(Path("out/report/report.md").read_text())
    assert float(runs[0]["validation loss"]) > 0
    assert (runs[0]["training loss"], runs[0]["tokens/s"]) == ("–", "–")


def test_mistakes_end_in_one_line(tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(report.main, words=["python report.py out/"])
    refuses(report.main, "nowhere", words=["nowhere", "config.json"])
    refuses(report.main, "nowhere", "--outdir=x", words=["did you mean out_dir?"])
    write_run(tmp_path / "a", 1, 2.0)
    refuses(report.main, "a", "a", words=["both seed 1", "a seed counts once"])
    refuses(report.main, "a", "--control=b", words=["control=b", "the arms are a"])
