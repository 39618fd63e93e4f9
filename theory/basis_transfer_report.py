"""What Section 5.1's experiment writes: results.json, table.md, and figures like the paper's figures 1 and 2."""

import dataclasses
import math
import statistics as stats
from pathlib import Path

import torch

from engine import runlog
from engine.files import write_json, write_text
from studies import drawing, page

FILES = ("results.json", "table.md", "figure1.png", "figure2.png")
MEASURES = {"error": "relative L2 error (%)", "cosine": "cosine similarity"}
METHODS = {"model": "trained MLP with skip", "linear": "best linear map"}
COLOURS = dict(zip(METHODS, drawing.COLOURS, strict=False))
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# The smallest and the largest of the paper's means for h = 256, 512 and 768.
PAPER = {
    ("model", "error"): (0.04, 0.05),
    ("linear", "error"): (0.09, 0.10),
    ("model", "cosine"): (0.999, 0.999),
    ("linear", "cosine"): (0.995, 0.995),
}
HEAD = "target|h|seeds|steps × batch|error, model|error, linear|linear / model|cosine, model|cosine, linear".split("|")
PAPER_ROW = "the paper's report|256–768|–|20,000 × 65,536|4.0–5.0 %|9.0–10.0 %|2|0.999|0.995".split("|")


def errors_and_cosines(prediction, y):
    """Relative L2 errors ‖ŷ − y‖/‖y‖ and cosine similarities of the rows of two (n, h): {measure: (n,) float64}."""
    prediction, y = prediction.double(), y.double()
    return {
        "error": (prediction - y).norm(dim=-1) / y.norm(dim=-1),
        "cosine": torch.nn.functional.cosine_similarity(prediction, y, dim=-1),
    }


def statistics(values):
    """Mean, standard deviation and quantiles of values, (n,) float64."""
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)).tolist()
    return {
        "mean": values.mean().item(),
        "std": values.std().item() if len(values) > 1 else 0.0,
        "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
    }


def write(cfg, results, samples):
    """Write FILES to cfg.out_dir. results, samples: of the finished runs; see `basis_transfer.TransferRun.evaluate`."""
    folder = Path(cfg.out_dir)
    facts = {"git_commit": runlog.git_commit(), "versions": runlog.versions()}
    write_json(folder / "results.json", {"config": dataclasses.asdict(cfg), **facts, "runs": results})
    write_text(
        folder / "table.md",
        f"{table(results)}\n\nMeans over {cfg.test_samples:,} held-out inputs, ± the standard deviation over seeds; "
        f"{describe_training(cfg)}.\n",
    )
    for name, measure in zip(FILES[2:], MEASURES, strict=True):
        draw(cfg, results, samples, measure, folder / name)


def other_options(cfg):
    """'name=value' of each option of the training, except its length, that differs from the paper's (the default)."""
    return [
        f"{field.name}={getattr(cfg, field.name):{'g' if field.type is float else ''}}"
        for field in dataclasses.fields(cfg)
        if field.name in ("learning_rate", "weight_decay", "grad_clip", "activation", "width_ratio")
        and getattr(cfg, field.name) != field.default
    ]


def describe_training(cfg):
    """In words, how the models were trained and how the paper's were."""
    paper = type(cfg)
    trained = f"trained {cfg.steps:,} steps × {cfg.batch:,} inputs" if cfg.steps else "no model trained"
    return "; ".join([f"{trained} (the paper: {paper.steps:,} × {paper.batch:,})", *other_options(cfg)])


def group_results(results):
    """(target, h) -> the indices of its results, one per seed, in their order."""
    groups = {}
    for i, result in enumerate(results):
        groups.setdefault((result["target"], result["h"]), []).append(i)
    return groups


def mean_and_deviation(values, form):
    """'mean ± standard deviation' of one value per seed; only the mean for one seed."""
    mean = form.format(stats.fmean(values))
    return f"{mean} ± {form.format(stats.stdev(values))}" if len(values) > 1 else mean


def table(results):
    """A Markdown table: the paper's row, then one per target and dimension, mean ± standard deviation over seeds."""
    rows = [PAPER_ROW]
    for (target, h), indices in group_results(results).items():
        runs = [results[i] for i in indices]
        linear = means(runs, "linear", "error")
        length = model_error = ratio = model_cosine = "–"
        if runs[0]["steps"] > 0:
            model = means(runs, "model", "error")
            length = f"{runs[0]['steps']:,} × {runs[0]['batch']:,}"
            model_error = percentage(model)
            ratio = mean_and_deviation([b / a for a, b in zip(model, linear, strict=True)], "{:.2f}")
            model_cosine = mean_and_deviation(means(runs, "model", "cosine"), "{:.5f}")
        linear_cosine = mean_and_deviation(means(runs, "linear", "cosine"), "{:.5f}")
        texts = [target, str(h), str(len(runs)), length, model_error, percentage(linear), ratio]
        rows.append([*texts, model_cosine, linear_cosine])
    return page.Table(HEAD, rows, words=("target",)).markdown()


def percentage(errors):
    """Relative errors, one per seed, as a percentage."""
    return f"{mean_and_deviation([100 * error for error in errors], '{:.2f}')} %"


def means(runs, method, measure):
    """The mean over held-out inputs of a measure in each of these runs."""
    return [run[method][measure]["mean"] for run in runs]


def draw(cfg, results, samples, measure, path):
    """Write histograms of a measure to a PNG: a panel for each target and dimension, all its seeds together."""
    groups, scale = group_results(results), 100 if measure == "error" else 1
    targets, dims = ({group[i] for group in groups} for i in (0, 1))
    columns = len(dims) if len(dims) > 1 else min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = drawing.new_figure(max(6, 3.6 * columns), 1.5 + 2.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, ((target, h), indices) in zip(panels, groups.items(), strict=False):
        panel.set_yticks([])
        panel.locator_params(axis="x", nbins=6)
        values = {
            method: scale * torch.cat([samples[i][method][measure] for i in indices]).cpu()
            for method in METHODS
            if method in samples[indices[0]]
        }
        ends = torch.cat(list(values.values())).quantile(torch.tensor((0.0005, 0.9995), dtype=torch.float64))
        bins = torch.linspace(*ends.tolist(), 81).numpy()
        for method, own in values.items():
            style = dict(color=COLOURS[method], label=f"{METHODS[method]} (dashed: mean)")
            panel.hist(own.numpy(), bins=bins, density=True, alpha=0.7, **style)
            panel.axvline(own.mean().item(), color=COLOURS[method], linestyle="--", linewidth=1.2)
            if target == "paper" and not other_options(cfg):
                low, high = (scale * end for end in PAPER[method, measure])
                label = "the paper's means, h = 256–768" if method == "linear" else None
                panel.axvspan(low, high, facecolor="0.9", edgecolor="0.65", linewidth=1.5, zorder=0, label=label)
        form = "{:.2f} %" if measure == "error" else "{:.4f}"
        shown = ", ".join(f"{method} {form.format(own.mean().item())}" for method, own in values.items())
        name = f"{target}, h = {h}\n" if len(targets) > 1 else f"h = {h}: "
        panel.set_title(name + shown, fontsize=9)
    for panel in panels[max(0, len(groups) - columns) : len(groups)]:  # the lowest of each column
        panel.set_xlabel(MEASURES[measure])
    figure.supylabel("density", fontsize=10)
    n_seeds = len({result["seed"] for result in results})
    seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
    heading = f"Target: {results[0]['target']}. " if len(targets) == 1 else ""
    data = f"{heading}{cfg.test_samples:,} held-out inputs × {seeds};"
    figure.suptitle(f"{data}\n{describe_training(cfg)}", fontsize=10)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    drawing.save(figure, path)
