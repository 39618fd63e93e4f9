"""The state of a study's runs, as a table for a terminal, and how long those that are left will take."""

import datetime
import json
import math
import shutil
import sys
import time
from pathlib import Path

from engine import run_files
from engine.flops import cost
from studies import store
from studies.runs import read_run, series
from studies.tuning import Choice
from train_config import TrainConfig

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
    the last one measured. Without the runs that tuning seeds have made needless. content: that of study.json.
    """
    choice = Choice(folder, content)
    arm_at = {(entry["arm"], json.dumps(entry["point"])): entry["name"] for entry in content["arms"]}
    result = []
    for seed in content["seeds"]:
        folders = {entry["name"]: store.run_folder(folder, entry["name"], seed) for entry in content["arms"]}
        metrics = {name: run_files.read_metrics(path) for name, path in folders.items()}
        losses = {name: series(folders[name], records, "eval", "val_loss") for name, records in metrics.items()}
        for entry in content["arms"]:
            if not choice.waits_for(entry["name"], seed) and not choice.needs(entry["name"], seed):
                continue
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
    """Print the state of a study's runs every `seconds` until all have ended; once where the output is no terminal.

    A study that has not begun is waited for.
    """
    while True:
        if not store.is_study(folder):
            print(f"{folder}: not begun", flush=True)
            if not sys.stdout.isatty():
                return
        while not store.is_study(folder):
            time.sleep(seconds)
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


def last_speed(runs, folder):
    """(run folder, training FLOPs per second, tokens per second) of the run that was measured last, or None.

    Among PlannedRuns, or, where none of them has a speed yet, among all runs in folder, up to three levels deep. A
    finished run's speed is that of its whole process, with its evaluations.
    """
    everywhere = [
        path for levels in ("*", "*/*", "*/*/*") for path in Path(folder).glob(f"{levels}/{run_files.METRICS}")
    ]
    for paths in ([run.folder / run_files.METRICS for run in runs], everywhere):
        paths = [path for path in paths if path.exists()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                if found := _speed(path.parent):
                    return found
            except ValueError:  # damaged, or another program's: a speed is not worth a complaint
                continue
    return None


def _speed(folder):
    """What last_speed returns, of one run folder; None where nothing was measured."""
    run = read_run(folder)
    speeds = run and [*series(folder, run.metrics, "train", "tokens_per_second").values()]
    if not speeds:
        return None
    speed = speeds[-1]
    if run.summary and run.summary.get("wall_seconds") and run.summary["steps"]:
        speed = run.summary["tokens"] / max(run.summary["wall_seconds"], run.summary.get("train_seconds") or 0)
    known = TrainConfig.__dataclass_fields__
    model = TrainConfig(**{name: value for name, value in run.config.items() if name in known}).model_config()
    return run.folder, speed * cost(model).training_flops, speed


def duration(runs, shares, jobs, folder):
    """A sentence: how long PlannedRuns take with so many at a time, at the speed that was measured last in folder.

    shares: of each run the part that is expected to be needed; see tuning.Choice.
    """
    found = last_speed(runs, folder)
    if not found:
        return f"how long is not known, since no run in {folder} has a measured speed yet"
    measured, rate, speed = found
    seconds = sum(shares[run] * run.flops * (1 - run.progress) for run in runs) / (rate * max(1, min(jobs, len(runs))))
    return (
        f"about {span(seconds)}, {jobs} at a time, if each does as many FLOPs a second as {measured}, the run that was "
        f"measured last ({speed:,.0f} tokens/s)"
    )


def span(seconds):
    """A time in words, to two digits or so: '40 s', '12 min', '3 h 20 min', '2 d 4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    whole = datetime.timedelta(minutes=minutes)
    return f"{whole.days} d {whole.seconds // 3600} h"
