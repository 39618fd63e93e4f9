"""Run folders grouped into arms: what is compared with what, and the losses and curves of each.

A study folder (see studies/store.py) says which run is of which arm, at which point of the grid, and which arm is its
control. Run folders without a study are grouped by their configurations: runs that differ in nothing but the seed are
one arm.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from engine import run_files
from engine.files import read_json
from engine.flops import cost
from engine.run_files import has_diverged, identity, last_step
from studies.store import read_study, run_folder, state
from train_config import TrainConfig


@dataclass
class Run:
    """A run folder's files as train.py wrote them; summary is None while the run is not finished."""

    folder: Path
    config: dict
    facts: dict
    summary: dict | None

    @cached_property
    def metrics(self):
        """The records of metrics.jsonl, in order."""
        return run_files.read_metrics(self.folder)

    @property
    def seed(self):
        """(seed, data_seed): runs of two arms that share it are a pair."""
        return self.config["seed"], self.config["data_seed"]

    @property
    def experiment(self):
        """What the runs of an arm have in common: all that determines a result, less the seed."""
        return {name: value for name, value in identity(self.config).items() if name not in ("seed", "data_seed")}

    @property
    def precision(self):
        """The number formats of its segments, in order: 'float32', or 'float32, bfloat16' if that changed on resume."""
        segments = [segment["dtype"] for segment in self.facts.get("segments", []) if segment.get("dtype")]
        return ", ".join(dict.fromkeys(segments or [str(self.facts.get("dtype"))]))


@dataclass
class Cell:
    """An arm at one point of the grid: finished runs that differ in nothing but the seed."""

    arm: str
    point: dict  # grid field -> value; empty without a grid
    control: str  # the arm that it is compared with; a control names itself
    configured: dict = field(default_factory=dict)  # grid field -> the value that the arm's own files set
    runs: dict = field(default_factory=dict)  # seed -> Run
    n_diverged: int = 0  # runs that are not among them because their loss was not finite

    @property
    def label(self):
        """The arm's name and, in brackets, the point of the grid."""
        return f"{self.arm} ({point_text(self.point)})" if self.point else self.arm

    @property
    def losses(self):
        """seed -> final validation loss, nats a token."""
        return {seed: run.summary["val_loss"] for seed, run in self.runs.items()}

    @property
    def example(self):
        """One of the runs, for what all of them have in common."""
        return next(iter(self.runs.values()))

    def curve(self, kind, name, seeds=None):
        """A metric at the steps that all runs recorded: steps, (n,), and values, (seeds, n) or (seeds, n, layers).

        seeds: those to take, in this order; None: all. A null among layers is NaN; a null record is none.
        """
        records = [
            {r["step"]: r[name] for r in self.runs[seed].metrics if r["kind"] == kind and r.get(name) is not None}
            for seed in (self.runs if seeds is None else seeds)
        ]
        steps = sorted(set.intersection(*map(set, records)))
        return np.array(steps), np.array([[record[step] for step in steps] for record in records], dtype=float)


@dataclass
class Results:
    """Everything that a report is about."""

    name: str
    grid: dict  # field -> values
    cells: list  # of Cell; those without a finished run are left out
    unfinished: list  # (folder, why) of each run that does not count
    command: str | None = None  # that repeats the study
    planned: list = field(default_factory=list)  # of Cell: those without a finished run, too

    @property
    def arms(self):
        """The names of the arms, in order."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def runs(self):
        """(cell, run) for every finished run."""
        return [(cell, run) for cell in self.cells for run in cell.runs.values()]

    @cached_property
    def size_fields(self):
        """The grid's fields that change what a model or its training costs (n_embd, max_iters): no matter of tuning."""
        config = self.cells[0].example.config
        return [name for name, values in self.grid.items() if changes_cost(config, name, values)]

    @property
    def tuned_fields(self):
        """The grid's other fields, over which each arm may choose its best value."""
        return [name for name, values in self.grid.items() if name not in self.size_fields and len(values) > 1]

    def points(self, cell):
        """The cells of a cell's arm and size, those without a finished run included."""
        return [other for other in self.planned if other.arm == cell.arm and self.size(other) == self.size(cell)]

    def candidates(self, cell):
        """The points among which the best of a cell's arm and size is chosen: no run of theirs has diverged."""
        points = [point for point in self.points(cell) if point.runs]
        return [point for point in points if not point.n_diverged] or points

    def size(self, cell):
        """The part of a cell's point that is its size."""
        return {name: value for name, value in cell.point.items() if name in self.size_fields}

    @cached_property
    def best(self):
        """The best cell of each arm at each size, in order."""
        firsts = {}
        for cell in self.cells:
            firsts.setdefault((cell.arm, *self.size(cell).values()), cell)
        return [lowest(self.candidates(cell)) for cell in firsts.values()]

    def _pairs(self, cells, place):
        """(cell, its control's cell) for each of some cells, where place(cell) is the same and they can be compared."""
        return [
            (cell, other)
            for cell in cells
            for other in cells
            if other.arm == cell.control != cell.arm and place(other) == place(cell) and are_comparable(cell, other)
        ]

    @property
    def best_pairs(self):
        """(the best cell of an arm, the best cell of its control) at each size."""
        return self._pairs(self.best, self.size)

    @property
    def configured_pairs(self):
        """(an arm, its control), each as its own files set the tuned fields, at each size: no loss had a part in it."""
        tuned = self.tuned_fields
        cells = [
            cell
            for cell in self.cells
            if tuned and all(name in cell.configured and cell.configured[name] == cell.point[name] for name in tuned)
        ]
        return self._pairs(cells, self.size)

    @property
    def point_pairs(self):
        """(cell, its control's cell at the same point)."""
        return self._pairs(self.cells, lambda cell: cell.point)

    def left_out_losses(self, cell):
        """seed -> the loss of this seed at the point that the other seeds choose, for the arm and size of a cell.

        Unlike the losses at the best point, these had no part in its choice. Of the seeds that all points have; empty
        where there is nothing to choose, or less than two such seeds.
        """
        cells = self.candidates(cell)
        seeds = common_seeds(cells)
        if len(cells) < 2 or len(seeds) < 2:
            return {}
        return {seed: lowest(cells, without=seed).losses[seed] for seed in seeds}

    def at_the_edge(self, cell):
        """The tuned fields whose value in this cell is the least or the greatest number tried; zero has none below."""
        found = []
        for name in self.tuned_fields:
            numbers, value = list(filter(is_number, self.grid[name])), cell.point[name]
            lower = value == min(numbers, default=None) and value != 0
            if len(numbers) > 1 and is_number(value) and (lower or value == max(numbers)):
                found.append(name)
        return found


def changes_cost(config, name, values):
    """Whether a field's values make models or trainings of different cost from a configuration, a dict."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    costs = set()
    for value in values:
        try:
            changed = TrainConfig(**{key: config[key] for key in known} | {name: value})
        except ValueError:  # a shape that needs other fields to go with it
            return True
        counts = cost(changed.model_config())
        costs.add((counts.total, counts.attn_mlp, changed.max_iters * changed.tokens_per_step))
    return len(costs) > 1


def common_seeds(cells):
    """The seeds that all of some cells have finished, in order."""
    return sorted(set.intersection(*(set(cell.runs) for cell in cells)))


def lowest(cells, without=None):
    """The cell with the lowest mean loss over the seeds that all of them have; without: a seed that has no say.

    Where no seed is everywhere, among those with the most seeds.
    """
    seeds = set(common_seeds(cells)) - {without}
    if not seeds:
        most = max(len(cell.runs) for cell in cells)
        cells = [cell for cell in cells if len(cell.runs) == most]
    return min(cells, key=lambda cell: np.mean([cell.losses[seed] for seed in seeds or cell.runs]))


def are_comparable(cell, control):
    """Whether two losses measure the same thing: filling in masked tokens is not foreseeing the next one."""
    return cell.example.config["objective"] == control.example.config["objective"]


def unlike(cell, control):
    """What beside their options is not alike in two cells whose losses are compared, as phrases."""
    a, b = (each.example for each in (cell, control))
    found = []
    if a.summary["tokens"] != b.summary["tokens"]:
        found.append(f"on {a.summary['tokens'] / b.summary['tokens']:.3g} × the tokens")
    if a.config["block_size"] != b.config["block_size"]:
        found.append(f"context {a.config['block_size']} against {b.config['block_size']}")
    if a.precision != b.precision:
        found.append(f"{a.precision} against {b.precision}")
    return found


def is_number(value):
    """Whether a value of the grid is a number (a boolean is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_text(value):
    """A value of the grid as text."""
    return f"{value:g}" if is_number(value) else str(value).lower()


def point_text(point):
    """A point of the grid as text: 'weight_decay 0.03125, attn_scale 0.5'."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items())


def load(folders, control=None):
    """The Results in one study folder or in run folders; control: the arm to compare all others with.

    Without control, a study's own are taken, and the first arm for run folders. Raises ValueError for a folder that is
    neither, a control that is no arm, two runs of one seed in an arm, runs of an arm that differ in more than the seed,
    and runs on different data.
    """
    studies = [folder for folder in folders if (Path(folder) / "study.json").exists()]
    if studies and len(folders) > 1:
        raise ValueError(f"{studies[0]} is a study: report on it alone, or name run folders ({studies[0]}/*/seed*)")
    results = _load_study(studies[0]) if studies else _load_runs(folders)
    results.planned, results.cells = results.cells, [cell for cell in results.cells if cell.runs]
    if not results.cells:
        folder, why = results.unfinished[0]
        raise ValueError(f"none of the runs is finished, so there is nothing to report; {folder}: {why}")
    if control is not None:
        if control not in results.arms:
            raise ValueError(f"control={control} is no arm with a finished run; the arms are {', '.join(results.arms)}")
        for cell in results.cells:
            cell.control = control
    _check_same_data(results)
    return results


def read_run(folder):
    """The Run in a folder, or None where train.py has not begun one."""
    config, facts, summary = (read_json(Path(folder) / name) for name in ("config.json", "run.json", "summary.json"))
    if config is None or facts is None:
        return None
    # A run that is older than an option did as the option's default does.
    return Run(Path(folder), dataclasses.asdict(TrainConfig()) | config, facts, summary)


def _load_study(folder):
    content = read_study(folder)
    results = Results(content["name"], content["grid"], [], [], content.get("command"))
    for entry in content["arms"]:
        cell = Cell(entry["arm"], entry["point"], entry["control"], entry.get("configured", {}))
        results.cells.append(cell)
        for seed in content["seeds"]:
            path = run_folder(folder, entry["name"], seed)
            run = read_run(path)
            if run is None or run.summary is None:
                where = f", step {last_step(path):,}" if run else ""
                results.unfinished.append((path, state(path) + where))
                cell.n_diverged += has_diverged(path)
            else:
                _add(cell, run)
    return results


def _load_runs(folders):
    groups = []  # lists of runs that differ in nothing but the seed
    for folder in folders:
        run = read_run(folder)
        if run is None:
            raise ValueError(
                f"{folder} is neither a study nor a run: it has no study.json, and not both config.json and run.json"
            )
        group = next((group for group in groups if group[0].experiment == run.experiment), None)
        if group is None:
            groups.append(group := [])
        group.append(run)
    names = _names(groups)
    results = Results(f"{names[0]} and {len(names) - 1} more" if len(names) > 2 else " and ".join(names), {}, [], [])
    for name, group in zip(names, groups, strict=True):
        cell = Cell(name, {}, names[0])
        results.cells.append(cell)
        for run in group:
            if run.summary is None:
                why = "diverged" if has_diverged(run.folder) else "not finished"
                where = f"step {last_step(run.folder):,} of {run.config['max_iters']:,}"
                results.unfinished.append((run.folder, f"{why}, {where}"))
                cell.n_diverged += has_diverged(run.folder)
            else:
                _add(cell, run)
    return results


def _add(cell, run):
    """Put a finished run into its cell."""
    if run.seed in cell.runs:
        seed, data_seed = run.seed
        raise ValueError(
            f"{cell.runs[run.seed].folder} and {run.folder} are both seed {seed} (data_seed {data_seed}) of "
            f"{cell.label}: a seed counts once, leave one of them out"
        )
    if cell.runs and run.experiment != cell.example.experiment:
        a, b = cell.example.experiment, run.experiment
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        raise ValueError(
            f"{cell.example.folder} and {run.folder}, runs of {cell.label}, differ in {', '.join(names)} and should "
            "differ in the seed alone: repeat one of them"
        )
    if cell.runs and run.precision != cell.example.precision:
        raise ValueError(
            f"{cell.example.folder} is in {cell.example.precision} and {run.folder} in {run.precision}, "
            f"which changes the loss of {cell.label} by more than chance: repeat one of them, with --dtype=…"
        )
    cell.runs[run.seed] = run


def _names(groups):
    """A name for each group of runs: its folder's, less what tells the seeds apart; the whole path where two agree."""
    names = []
    for group in groups:
        folders = [run.folder.resolve() for run in group]
        name = os.path.commonprefix([folder.name for folder in folders])  # noqa: RUF071 (of names, not of paths)
        name = name.rstrip("0123456789") if len(group) > 1 else name
        if name.rstrip("0123456789") in ("", "seed"):  # folders as in a study: ARM/seed1
            name = folders[0].parent.name
        names.append(re.sub(r"[-_.,= ]*(seed|(?<=[-_.,= ])s)?[-_.,= ]*$", "", name))
    return [str(group[0].folder) if names.count(name) > 1 else name for name, group in zip(names, groups, strict=True)]


def _check_same_data(results):
    first = results.cells[0].example
    for _, run in results.runs:
        a, b = (r.facts["data"]["fingerprint"] for r in (first, run))
        if a != b:
            raise ValueError(
                f"{first.folder} and {run.folder} were trained on different data (fingerprints {a} and {b}), so their "
                "losses cannot be compared: report on them separately"
            )
