"""Compare runs: a table of what each is and what it reached, and a figure of their loss curves.

    python report.py out/quick-baseline_tied out/quick-reduced_tied --out_dir=out/report

Writes report.md and loss.png into out_dir, and prints the table.
"""

from dataclasses import dataclass
from pathlib import Path

import configurator
import runlog

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


@dataclass
class ReportConfig:
    """Which runs to compare, and where the comparison goes."""

    runs: tuple[str, ...] = ()  # run folders, given without --
    out_dir: str = "out/report"  # where report.md and loss.png go


def load_run(folder):
    """A run folder's name, config, run facts, metrics and summary (None while unfinished). Raises ValueError."""
    config, facts = (runlog.read_json(Path(folder) / name) for name in ("config.json", "run.json"))
    if config is None or facts is None:
        raise ValueError(f"{folder} is not a run folder: it has no config.json and run.json")
    summary = runlog.read_json(Path(folder) / "summary.json")
    metrics = runlog.read_metrics(folder)
    return {"name": Path(folder).name, "config": config, "facts": facts, "metrics": metrics, "summary": summary}


def table(runs):
    """A Markdown table with one row a run; losses in nats a token."""
    rows = [
        ["run", "W_Q", "scale", "weight decay", "parameters", "attn + MLP", "steps", "validation loss", "tokens/s"],
        ["---"] + ["---:"] * 8,
    ]
    for run in runs:
        config, parameters, summary = run["config"], run["facts"]["parameters"], run["summary"]
        if summary:
            error, rate = summary["val_loss_se"], summary["tokens_per_second"]
            loss = f"{summary['val_loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")
            speed = "–" if rate is None else f"{rate:,.0f}"
        else:
            evaluations = [record for record in run["metrics"] if record["kind"] == "eval"]
            loss = f"{evaluations[-1]['val_loss']:.4f} (unfinished)" if evaluations else "unfinished"
            speed = "–"
        rows.append(
            [
                run["name"],
                "I" if config["wq_identity"] else "trained",
                f"{config['attn_scale']:g}/√{config['n_embd'] // config['n_head']}",
                f"{config['weight_decay']:g}",
                millions(parameters["total"]),
                millions(parameters["attn_mlp"]),
                f"{summary['steps'] if summary else last_step(run['metrics']):,}",
                loss,
                speed,
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def millions(count):
    """A number of parameters as Table 2 prints them: 124.4M, 0.780M."""
    return f"{count / 1e6:.1f}M" if count >= 10e6 else f"{count / 1e6:.3f}M"


def last_step(metrics):
    """The step of the last record, 0 where there is none."""
    return max((record["step"] for record in metrics), default=0)


def draw(runs, path):
    """Write the loss curves of runs to a PNG: training loss thin, validation loss thick, against training tokens."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        per_step = run["config"]["tokens_per_step"] / 1e6
        for kind, name, style in (
            ("train", "loss", {"linewidth": 0.8, "alpha": 0.45}),
            ("eval", "val_loss", {"linewidth": 2, "marker": "o", "markersize": 3, "label": run["name"]}),
        ):
            records = [record for record in run["metrics"] if record["kind"] == kind]
            axes.plot([r["step"] * per_step for r in records], [r[name] for r in records], color=colour, **style)
    losses = [r["val_loss"] for run in runs for r in run["metrics"] if r["kind"] == "eval" and r["step"]]
    if losses:  # the first steps would flatten everything else
        lowest = min(losses + [r["loss"] for run in runs for r in run["metrics"] if r["kind"] == "train"])
        axes.set_ylim(lowest - 0.05 * (max(losses) - lowest), max(losses) + 0.25 * (max(losses) - lowest))
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("Validation loss (thick) and training loss (thin)", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(cfg):
    """Write the report of cfg.runs; its table. Raises ValueError when there are none or one is not a run folder."""
    if not cfg.runs:
        raise ValueError("name the run folders to compare: python report.py out/FIRST out/SECOND")
    runs = [load_run(folder) for folder in cfg.runs]
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = table(runs)
    (folder / "report.md").write_text(
        f"{text}\n\nLosses in nats a token over all of the validation split, ± the standard error over its windows.\n\n"
        "![Loss curves](loss.png)\n",
        encoding="utf-8",
    )
    draw(runs, folder / "loss.png")
    return text


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(ReportConfig, argv, positional="runs")
    print(report(cfg))
    print(f"\n{cfg.out_dir}/report.md, {cfg.out_dir}/loss.png")


if __name__ == "__main__":
    configurator.run(main)
