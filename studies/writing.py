"""What a report consists of: its parts in order, its figures, and the rows of its CSV files."""

import csv
import dataclasses
import io
import re

from engine.files import make_folder, write_text
from engine.flops import cost
from model import GPTConfig
from studies import arms, benchmarks, comparison, delay, figures, page, point_figures, sections, table_2, verdicts
from studies.runs import named
from studies.texts import value_text


def training_flops(run):
    """The floating-point operations of a finished run's training."""
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    config = GPTConfig(**{name: value for name, value in run.config.items() if name in known})
    return cost(config).training_flops * run.summary["tokens"]


def draw(results, comparisons, flops, folder):
    """Draw the figures that apply to the results into folder; a list of page.Figure.

    comparisons: those of results.best_pairs. flops: run folder -> FLOPs.
    """
    import matplotlib

    several = any(len(cell.runs) > 1 for cell in results.cells)
    bars = "Bands and bars are 95 % t-intervals over seeds." if several else "One seed: no intervals."
    bands = "Means over seeds, whose intervals the tables have." if len(results.arms) > point_figures.MANY else bars
    best = ", each arm at its best point of the grid" if results.tuned_fields else ""
    windows = " or ".join(str(n) for n in sorted({run.config["eval_windows"] for _, run in results.runs}))
    wanted = {
        "differences.png": (
            lambda results, path: point_figures.differences(results, comparisons, path),
            f"Difference of each arm from its control in final validation loss{best}. Filled: significant"
            f"{' after correction for several comparisons (Holm)' if len(comparisons) > 1 else ''}. {bars}",
        ),
        "loss.png": (
            figures.curves,
            f"Loss during training{best}, and below the difference from control. Validation losses during training are "
            f"over {windows} windows, those in the tables over the whole validation split. {bands}",
        ),
        "heat_map.png": (
            point_figures.heat_maps,
            "Mean validation loss at each point; frames mark the best ones.",
        ),
        "grid.png": (
            point_figures.lines,
            f"Validation loss over the grid (filled: an arm's best point) and, below, the paired differences; arrows "
            f"mark values off the scale. {bands}",
        ),
        "cost.png": (
            lambda results, path: point_figures.cost(results, flops, path),
            f"Validation loss{best} against parameters and training FLOPs; grey lines connect a control with its arms, "
            f"arrows mark values off the scale. {bands}",
        ),
    }
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in an arm's name begins no formula
        drawn = [page.Figure(name, text) for name, (plot, text) in wanted.items() if plot(results, folder / name)]
        for number, (cell, control) in enumerate(results.best_pairs):
            name = file_name("-".join(["diagnostics", cell.arm, *map(value_text, results.size(cell).values())]))
            if name in [figure.name for figure in drawn]:
                name = f"diagnostics-{number}.png"
            if figures.diagnostics(cell, control, folder / name):
                arms_shown = f"{control.label} (left) and {cell.label}"
                text = f"Attention diagnostics of each layer in {arms_shown}; means over seeds."
                drawn.append(page.Figure(name, text))
    return drawn


def file_name(text):
    """The name of a PNG for a text, which may be a folder's name: short enough, without spaces and the like."""
    return re.sub(r"[^\w.+=-]", "-", text).encode()[:200].decode(errors="ignore") + ".png"


def run_rows(results, flops):
    """The rows of runs.csv: a dict for each run, finished or not."""
    measured = "steps tokens val_loss val_loss_se best_val_loss_during_training tokens_per_second".split()
    rows = [
        {"arm": cell.arm}
        | cell.point
        | {"seed": run.config["seed"], "data_seed": run.config["data_seed"]}
        | {"folder": named(run.folder, results.base), "state": "finished"}
        | ({"part": "reported" if run in cell.runs.values() else "tuning"} if results.tuning_seeds else {})
        | {name: run.summary.get(name) for name in measured}
        | ({"bits_per_byte": run.summary["bits_per_byte"]} if run.summary.get("bits_per_byte") is not None else {})
        | {"parameters": run.facts["parameters"]["total"], "attn_mlp": run.facts["parameters"]["attn_mlp"]}
        | {"training_flops": flops[run.folder], "data": run.facts["data"]["fingerprint"]}
        | {"date": run.date, "git_commit": run.facts["git_commit"], "torch": run.facts["versions"]["torch"]}
        | {"device": run.facts["device"], "dtype": run.precision, "changed_options": run.changes_text}
        for cell, run in results.runs
    ]
    return rows + [{"folder": named(folder, results.base), "state": why} for folder, why in results.unfinished]


def comparison_rows(results, comparisons):
    """The rows of comparison.csv. comparisons: those of results.best_pairs."""
    rows = _rows("best", results.best_pairs, comparisons)
    for row, pair in zip(rows, results.best_pairs, strict=True):
        steps, tokens = delay.delays(results, *pair) or (None, None)
        delays = {"delay_steps": steps, "delay_percent": tokens}
        row |= {name: mean and float(f"{mean.mean:.4g}") for name, mean in delays.items()}
    if results.tuned_fields:
        losses = [tuple(map(results.leave_one_out_losses, pair)) for pair in results.best_pairs]
        chosen_by_others = _rows("points chosen by the other seeds", results.best_pairs, comparison.compare(losses))
        for row, (_, control) in zip(chosen_by_others, results.best_pairs, strict=True):
            row = {name: value for name, value in row.items() if name not in results.tuned_fields}
            rows.append(row | {"control": control.arm})  # each seed has a point of its own, so none is named
        for kind, pairs in (("as configured", results.configured_pairs), ("same point", results.point_pairs)):
            rows += _rows(kind, pairs, arms.compare_cells(pairs))
    return rows


def _rows(kind, pairs, comparisons):
    """Rows of comparison.csv for (cell, control) pairs and their comparisons. kind: how the pairs were chosen."""
    needed = ("seeds_needed", "seeds_needed_least", "seeds_needed_most")
    return [
        {"compared": kind, "arm": cell.arm}
        | cell.point
        | {"control": control.label}
        | {name: value for name, value in dataclasses.asdict(found.difference).items() if name != "n"}
        | {"p_holm": found.p_holm, "seeds": found.difference.n}
        | ({"margin": found.equivalence.margin, "p_equal": found.equivalence.p_holm} if found.equivalence else {})
        | dict(zip(needed, found.seeds_needed or [None] * 3, strict=True))
        | {"verdict": found.verdict}
        for (cell, control), found in zip(pairs, comparisons, strict=True)
    ]


def csv_value(value):
    """A value as a CSV file has it: numbers with eight digits, which all machines agree on, and no -0."""
    return float(f"{value:.8g}") + 0.0 if isinstance(value, float) else value


def write_csv(path, rows):
    """Write dicts as CSV, with a column for each key that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows({name: csv_value(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def parts(results, comparisons, headlines, drawn):
    """The parts of the report, in order; see studies/page.py."""
    content = [page.Heading(results.name, level=1)]
    headlines = [*headlines, *sections.cautions(results)]
    content += [page.Items(headlines)] if headlines else []
    table = table_2.table_2(results.best)
    content += [page.Heading("Arms and their losses"), table, page.Paragraph(table_2.reading(table))]
    if note := table_2.paper_note(results.best):
        content.append(page.Paragraph(note))
    if comparisons:
        first = [figure for figure in drawn if figure.name == "differences.png"]
        drawn = [figure for figure in drawn if figure not in first]
        content += [page.Heading("Differences from control"), *first, sections.differences(results, comparisons)]
        content.append(page.Items(sections.reading_notes(results, comparisons)))
    if found := benchmarks.table(results):
        content += [page.Heading("Benchmarks"), found, page.Paragraph(benchmarks.NOTE)]
    if drawn:
        content += [page.Heading("Figures"), *drawn]
    if results.tuned_fields:
        content += [page.Heading("The grid"), page.Items(sections.tuning_notes(results)), sections.every_point(results)]
    content += [page.Heading("Runs"), *map(page.Paragraph, sections.setting(results)), *sections.run_table(results)]
    if results.unfinished:
        content.append(page.Paragraph("Not finished, and excluded from all numbers of this report:"))
        content.append(page.Items(sections.unfinished_runs(results)))
    if results.command:
        content += [page.Paragraph("To repeat the study:"), page.Code(results.command)]
    return content


def write(results, folder):
    """Write report.md, report.html, both CSV files and the figures; (folder, the table of arms, the headlines)."""
    make_folder(folder)
    flops = {run.folder: training_flops(run) for _, run in results.runs}
    comparisons = arms.compare_cells(results.best_pairs, results.equal_within)
    headlines = verdicts.headlines(results, comparisons)
    content = parts(results, comparisons, headlines, draw(results, comparisons, flops, folder))
    write_text(folder / "report.md", page.markdown(content))
    write_text(folder / "report.html", page.web_page(content, results.name, folder))
    write_csv(folder / "runs.csv", run_rows(results, flops))
    write_csv(folder / "comparison.csv", comparison_rows(results, comparisons))
    return folder, table_2.table_2(results.best), headlines
