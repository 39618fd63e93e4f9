"""What Section 5.1's experiment writes: results.json, table.md, and figures 1 and 2 like the paper's."""

import dataclasses
import statistics as stats
from pathlib import Path

import torch

from engine import runlog
from engine.files import write_json

FILES = ("results.json", "table.md", "figure1.png", "figure2.png")
MEASURES = {"error": "relative L2 error (%)", "cosine": "cosine similarity"}
METHODS = {"model": "trained MLP with skip", "linear": "best linear map"}
COLOURS = {"model": "#0072B2", "linear": "#D55E00"}  # Okabe and Ito's, which colour-blind readers can tell apart
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# The paper's means, for h = 256, 512 and 768: from, to.
PAPER = {
    ("model", "error"): (0.04, 0.05),
    ("linear", "error"): (0.09, 0.10),
    ("model", "cosine"): (0.999, 0.999),
    ("linear", "cosine"): (0.995, 0.995),
}
PAPER_ROW = "| the paper's report | 256–768 | – | 20,000 × 65,536 | 4.0–5.0 % | 9.0–10.0 % | 2 | 0.999 | 0.995 |"


def compare(prediction, y):
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
    """Write FILES into cfg.out_dir. results, samples: those of the finished runs (see `basis_transfer.Run`)."""
    folder = Path(cfg.out_dir)
    facts = {"git_commit": runlog.git_commit(), "versions": runlog.versions()}
    write_json(folder / "results.json", {"config": dataclasses.asdict(cfg), **facts, "runs": results})
    (folder / "table.md").write_text(
        f"{table(results)}\n\nMeans over {cfg.test_samples:,} held-out inputs, ± the standard deviation over seeds; "
        f"{conditions(cfg)}.\n",
        encoding="utf-8",
    )
    for name, measure in zip(FILES[2:], MEASURES, strict=True):
        draw(cfg, results, samples, measure, folder / name)


def changed(cfg):
    """'name=value' of each option of a run, beside its length, that is not the paper's (the default)."""
    return [
        f"{field.name}={getattr(cfg, field.name):{'g' if field.type is float else ''}}"
        for field in dataclasses.fields(cfg)
        if field.name in ("learning_rate", "weight_decay", "grad_clip", "activation", "width_ratio")
        and getattr(cfg, field.name) != field.default
    ]


def conditions(cfg):
    """How cfg's models were trained, beside the paper's protocol (the defaults), for people."""
    paper = type(cfg)
    trained = f"trained {cfg.steps:,} steps × {cfg.batch:,} inputs" if cfg.steps else "no model trained"
    return "; ".join([f"{trained} (the paper: {paper.steps:,} × {paper.batch:,})", *changed(cfg)])


def cases(results):
    """(target, h) -> the numbers of its runs among results, in their order."""
    found = {}
    for number, result in enumerate(results):
        found.setdefault((result["target"], result["h"]), []).append(number)
    return found


def spread(values, form):
    """Mean ± standard deviation of one value a seed; no ± for one."""
    mean = form.format(stats.fmean(values))
    return mean + (f" ± {form.format(stats.stdev(values))}" if len(values) > 1 else "")


def table(results):
    """A Markdown table: one row a target and dimension, mean ± standard deviation over seeds, after the paper's row."""
    lines = [
        "| target | h | seeds | steps × batch | error, model | error, linear | linear / model | cosine, model "
        "| cosine, linear |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        PAPER_ROW,
    ]
    for (target, h), numbers in cases(results).items():
        runs = [results[number] for number in numbers]
        trained = runs[0]["steps"] > 0
        linear, cosine = means(runs, "linear", "error"), spread(means(runs, "linear", "cosine"), "{:.5f}")
        row = ["–", f"{spread([100 * error for error in linear], '{:.2f}')} %", "–", "–", cosine]
        if trained:
            model = means(runs, "model", "error")
            row[0] = f"{spread([100 * error for error in model], '{:.2f}')} %"
            row[2] = spread([b / a for a, b in zip(model, linear, strict=True)], "{:.2f}")
            row[3] = spread(means(runs, "model", "cosine"), "{:.5f}")
        length = f"{runs[0]['steps']:,} × {runs[0]['batch']:,}" if trained else "–"
        lines.append("| " + " | ".join(map(str, [target, h, len(runs), length, *row])) + " |")
    return "\n".join(lines)


def means(runs, method, measure):
    """The mean over held-out inputs of a measure in each of these runs."""
    return [run[method][measure]["mean"] for run in runs]


def draw(cfg, results, samples, measure, path):
    """Write histograms of a measure to a PNG: a panel for each target and dimension, all its seeds together."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found, scale = cases(results), 100 if measure == "error" else 1
    targets, dims = ({case[i] for case in found} for i in (0, 1))
    columns = len(dims) if len(dims) > 1 else min(3, len(found))
    rows = -(-len(found) // columns)
    size = (max(6, 3.6 * columns), 1.5 + 2.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in axes.flat[len(found) :]:
        panel.set_axis_off()
    for panel, ((target, h), numbers) in zip(axes.flat, found.items(), strict=False):
        panel.set_yticks([])
        panel.locator_params(axis="x", nbins=6)
        values = {
            method: scale * torch.cat([samples[number][method][measure] for number in numbers]).cpu()
            for method in METHODS
            if method in samples[numbers[0]]
        }
        ends = torch.cat(list(values.values())).quantile(torch.tensor((0.0005, 0.9995), dtype=torch.float64))
        bins = torch.linspace(*ends.tolist(), 81).numpy()
        for method, own in values.items():
            style = dict(color=COLOURS[method], label=f"{METHODS[method]} (dashed: mean)")
            panel.hist(own.numpy(), bins=bins, density=True, alpha=0.7, **style)
            panel.axvline(own.mean().item(), color=COLOURS[method], linestyle="--", linewidth=1.2)
            if target == "paper" and not changed(cfg):
                low, high = (scale * end for end in PAPER[method, measure])
                label = "the paper's means, h = 256–768" if method == "linear" else None
                panel.axvspan(low, high, facecolor="0.9", edgecolor="0.65", linewidth=1.5, zorder=0, label=label)
        form = "{:.2f} %" if measure == "error" else "{:.4f}"
        shown = ", ".join(f"{method} {form.format(own.mean().item())}" for method, own in values.items())
        name = f"{target}, h = {h}\n" if len(targets) > 1 else f"h = {h}: "
        panel.set_title(name + shown, fontsize=9)
    for panel in axes.flat[max(0, len(found) - columns) : len(found)]:  # the lowest of each column
        panel.set_xlabel(MEASURES[measure])
    figure.supylabel("density", fontsize=10)
    n_seeds = len({result["seed"] for result in results})
    heading = f"Target: {results[0]['target']}. " if len(targets) == 1 else ""
    figure.suptitle(
        f"{heading}{cfg.test_samples:,} held-out inputs × {n_seeds} seed{'s' * (n_seeds > 1)};\n{conditions(cfg)}",
        fontsize=10,
    )
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
