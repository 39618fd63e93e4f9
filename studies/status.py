"""The state of a study's runs, as a table for a terminal."""

import json
import math
import shutil
import sys
import time

from engine import run_files
from studies import store
from studies.runs import series

COLUMNS = {  # of the table: key of a run's dict -> heading, format
    "run": ("run", "{}"),
    "state": ("state", "{}"),
    "step": ("step", "{:,}"),
    "val_loss": ("val. loss", "{:.4f}"),
    "difference": ("vs control", "{:+.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


def rows(folder, content):
    """A dict for each run of a study, read from its files; what is not known is None.

    run: its label; state: see store.state; step: the last one; val_loss: of the last evaluation, nats per token;
    difference: val_loss minus that of the control with the same seed, at the same point and step; tokens_per_second:
    the last one measured. content: that of study.json.
    """
    arm_at = {(entry["arm"], json.dumps(entry["point"])): entry["name"] for entry in content["arms"]}
    result = []
    for seed in content["seeds"]:
        folders = {entry["name"]: store.run_folder(folder, entry["name"], seed) for entry in content["arms"]}
        metrics = {name: run_files.read_metrics(path) for name, path in folders.items()}
        losses = {name: series(folders[name], records, "eval", "val_loss") for name, records in metrics.items()}
        for entry in content["arms"]:
            name, control = entry["name"], arm_at.get((entry["control"], json.dumps(entry["point"])))
            step, loss = next(reversed(losses[name].items()), (None, None))
            is_compared = name != control and step in losses.get(control, ())
            speeds = [*series(folders[name], metrics[name], "train", "tokens_per_second").values()]
            result.append(
                {
                    "run": f"{name}/seed{seed}",
                    "state": store.state(folders[name]),
                    "step": metrics[name][-1]["step"] if metrics[name] else None,
                    "val_loss": loss,
                    "difference": loss - losses[control][step] if is_compared else None,
                    "tokens_per_second": speeds[-1] if speeds else None,
                }
            )
    return result


def view(name, runs, width=None, height=None):
    """The text that shows the dicts of `rows`: a line of counts, then one line per run, cut to width and height.

    Where there are too many lines, running runs come first, and the last line says how many are not shown.
    """
    counts = {state: sum(row["state"] == state for row in runs) for state in store.STATES}
    shown = runs
    if height and len(runs) > height - 3:
        shown = sorted(runs, key=lambda row: store.STATES.index(row["state"]))[: max(1, height - 4)]
    cells = [[heading for heading, _ in COLUMNS.values()]]
    cells += [
        ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in shown
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    excess = max(0, sum(widths) + 2 * (len(widths) - 1) - (width or math.inf))
    widths[0] -= min(excess, max(0, widths[0] - 12))  # shorten names in the middle rather than rows at their end
    lines = [f"{name}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)]
    for run, state, *numbers in cells:
        if len(run) > widths[0]:
            run = run[: widths[0] // 2] + "…" + run[len(run) - (widths[0] - 1) // 2 :]
        numbers = [text.rjust(column) for text, column in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join([run.ljust(widths[0]), state.ljust(widths[1]), *numbers]))
    if len(shown) < len(runs):
        lines.append(f"… and {len(runs) - len(shown)} more")
    return "\n".join(line[:width] for line in lines)


def watch(folder, seconds):
    """Print the state of a study's runs every `seconds` until all have ended; once where the output is no terminal."""
    while True:
        content = store.read_study(folder)
        runs = rows(folder, content)
        if not sys.stdout.isatty():
            print(view(content["name"], runs))
            return
        size = shutil.get_terminal_size()
        print("\x1b[H\x1b[J" + view(content["name"], runs, size.columns, size.lines), flush=True)
        if all(row["state"] in ("finished", "diverged") for row in runs):
            return
        time.sleep(seconds)
