"""Run folders grouped into arms: which arm is compared with which, and the losses and curves of each.

A study folder (see studies/store.py) says to which arm and point of the grid a run belongs, which arm is its control,
and with which seeds the points of the grid are chosen. Run folders without a study are grouped by their configurations:
runs that differ only in the seed are one arm.
"""

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from engine import run_files
from engine.flops import cost
from studies import comparison
from studies.page import plain
from studies.runs import is_number, named, read_run, series
from studies.store import is_study, read_study, run_folder, state
from studies.texts import point_text
from train_config import TrainConfig


@dataclass(eq=False)  # cells are told apart by identity, and can be keys
class Cell:
    """An arm at one point of the grid: its finished runs, which differ only in the seed.

    The runs of a study's tuning_seeds choose the point and are reported nowhere else; without such seeds all runs do
    both.
    """

    arm: str
    point: dict  # grid field -> value; empty without a grid
    control: str  # the arm that it is compared with; a control names itself
    configured: dict = field(default_factory=dict)  # grid field -> the arm's default setting, from its own files
    runs: dict = field(default_factory=dict)  # seed -> Run: those that are reported
    tuning: dict = field(default_factory=dict)  # seed -> Run: those that only choose the point
    n_diverged: int = 0  # further runs, which diverged

    @property
    def label(self):
        """The arm's name and, in brackets, the point of the grid."""
        return f"{self.arm} ({point_text(self.point)})" if self.point else self.arm

    @property
    def losses(self):
        """seed -> final validation loss, nats per token."""
        return {seed: run.summary["val_loss"] for seed, run in self.runs.items()}

    @property
    def choosing_losses(self):
        """seed -> final validation loss of the runs by which a point is chosen."""
        return {seed: run.summary["val_loss"] for seed, run in (self.tuning or self.runs).items()}

    @property
    def all_runs(self):
        """All finished runs."""
        return [*self.tuning.values(), *self.runs.values()]

    @property
    def example(self):
        """One of the runs, to look up what all of them have in common."""
        return next(iter((self.runs or self.tuning).values()))

    def curve(self, kind, name, seeds=None):
        """A metric at the steps that all runs recorded: steps, (n,), and values, (seeds, n) or (seeds, n, layers).

        kind, name: which records of metrics.jsonl, and which of their values. seeds: those to take, in this order;
        None: all. Records where the value is null are left out; a null among the values of the layers becomes NaN.
        Raises ValueError for records that do not have such values.
        """
        runs = [self.runs[seed] for seed in (self.runs if seeds is None else seeds)]
        records = [series(run.folder, run.metrics, kind, name) for run in runs]
        steps = sorted(set.intersection(*map(set, records)))
        values = [[record[step] for step in steps] for record in records]
        if len({np.shape(value) for row in values for value in row}) > 1:
            folders = ", ".join(str(run.folder) for run in runs)
            raise ValueError(f"{name} must have as many layers in all {kind} records of {folders}: one is damaged")
        return np.array(steps), np.array(values, dtype=float)


@dataclass
class Results:
    """Everything that a report is about."""

    name: str
    grid: dict  # field -> values
    cells: list  # of Cell, each with at least one finished run, be it one that only chooses a point
    unfinished: list  # (folder, state) of each run that is not finished
    command: str | None = None  # the command that repeats the study
    all_cells: list = field(default_factory=list)  # cells, and those without a finished run
    tuning_seeds: tuple = ()  # with which points are chosen; the others are reported
    equal_within: float | None = None  # the fraction of the control's loss within which two arms count as equal
    later: list = field(default_factory=list)  # (cell, folder) of runs that are needed only if their point is chosen
    base: str | None = None  # the folder from which run folders are named
    about: tuple | None = None  # the options in which arms are meant to differ, beside the grid's; None: not known

    @property
    def arms(self):
        """The names of the arms, in order."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def runs(self):
        """(cell, run) for every finished run."""
        return [(cell, run) for cell in self.cells for run in cell.all_runs]

    @cached_property
    def size_fields(self):
        """The grid's fields that change the cost of a model or its training (n_embd, max_iters); they are not tuned."""
        config = self.cells[0].example.config
        return [name for name, values in self.grid.items() if changes_cost(config, name, values)]

    @property
    def tuned_fields(self):
        """The grid's other fields, of which each arm may have its best value."""
        return [name for name, values in self.grid.items() if name not in self.size_fields and len(values) > 1]

    def points(self, cell):
        """The cells of the same arm and size as a cell, including those without a finished run."""
        return [other for other in self.all_cells if other.arm == cell.arm and self.size(other) == self.size(cell)]

    def candidates(self, cell):
        """The cells among which the best of a cell's arm and size is chosen: those of which no run has diverged.

        Where there is none of these, all that have a finished run.
        """
        points = [point for point in self.points(cell) if point.choosing_losses]
        return [point for point in points if not point.n_diverged] or points

    def size(self, cell):
        """The part of a cell's point that is its size: size field -> value."""
        return {name: value for name, value in cell.point.items() if name in self.size_fields}

    @cached_property
    def best(self):
        """The chosen cells of which a run that is reported has finished."""
        return [cell for cell in self.chosen if cell.runs]

    @cached_property
    def chosen(self):
        """The cell of each arm at each size with the lowest loss, in order."""
        firsts = {}
        for cell in self.cells:
            firsts.setdefault((cell.arm, *self.size(cell).values()), cell)
        return [lowest(self.candidates(cell)) for cell in firsts.values()]

    def _pairs(self, cells, place):
        """(cell, its control's cell) for each cell whose control has a comparable cell with the same place(cell)."""
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
        """(cell of an arm, cell of its control) with each arm's default settings of the tuned fields, at each size.

        Unlike the best points, these were not chosen by any result.
        """
        tuned = self.tuned_fields
        cells = [
            cell
            for cell in self.cells
            if cell.runs
            and tuned
            and all(name in cell.configured and cell.configured[name] == cell.point[name] for name in tuned)
        ]
        return self._pairs(cells, self.size)

    @property
    def point_pairs(self):
        """(cell, its control's cell at the same point)."""
        return self._pairs(self.cells, lambda cell: cell.point)

    def leave_one_out_losses(self, cell):
        """seed -> its loss at the point that is best for the other seeds, for the arm and size of a cell.

        Unlike the losses at the best point, these had no part in choosing it. Only of seeds that are finished at all
        points; empty where there is only one point, or fewer than two such seeds, or a study's tuning_seeds choose.
        """
        if self.tuning_seeds:
            return {}
        cells = self.candidates(cell)
        seeds = common_seeds(cells)
        if len(cells) < 2 or len(seeds) < 2:
            return {}
        return {seed: lowest(cells, without=seed).losses[seed] for seed in seeds}

    def at_the_edge(self, cell):
        """The tuned fields whose value in a cell is the grid's least number, unless that is zero, or its greatest."""
        found = []
        for name in self.tuned_fields:
            numbers, value = list(filter(is_number, self.grid[name])), cell.point[name]
            lower = value == min(numbers, default=None) and value != 0
            if len(numbers) > 1 and is_number(value) and (lower or value == max(numbers)):
                found.append(name)
        return found


def changes_cost(config, name, values):
    """Whether different values of a field change a model's parameters or the tokens of its training.

    config: the other fields, name -> value.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    costs = set()
    for value in values:
        try:
            changed = TrainConfig(**{key: config[key] for key in known} | {name: value})
        except ValueError:  # a shape that is valid only with other fields changed, too
            return True
        counts = cost(changed.model_config())
        costs.add((counts.total, counts.attn_mlp, changed.max_iters * changed.tokens_per_step))
    return len(costs) > 1


def common_seeds(cells):
    """The seeds that are finished in all of the cells, in order: of those by which points are chosen."""
    return sorted(set.intersection(*(set(cell.choosing_losses) for cell in cells)))


def lowest(cells, without=None):
    """The cell with the lowest mean loss over the seeds that all cells have; without: a seed that is left out.

    If no seed is in all cells: the cell with the lowest mean loss among those with the most seeds.
    """
    seeds = set(common_seeds(cells)) - {without}
    if not seeds:
        most = max(len(cell.choosing_losses) for cell in cells)
        cells = [cell for cell in cells if len(cell.choosing_losses) == most]
    return min(cells, key=lambda cell: np.mean([cell.choosing_losses[seed] for seed in seeds or cell.choosing_losses]))


def are_comparable(cell, control):
    """Whether two cells' losses measure the same thing: that of masked tokens and that of the next token do not."""
    return cell.example.config["objective"] == control.example.config["objective"]


def compare_cells(pairs, equal_within=None):
    """A comparison.Comparison for each (cell, control's cell) in pairs; together they are one family of tests."""
    return comparison.compare([(cell.losses, control.losses) for cell, control in pairs], equal_within)


def load(folders, control=None, about=(), base=None):
    """The Results of one study folder, or of run folders.

    control: the arm to compare all others with; None: the study's own controls, or the first arm of run folders.
    about: the options in which the arms are meant to differ; none: what the study says. base: the folder from which
    run folders are named; None: that of the study.
    Raises ValueError for a folder that is neither, a control that is not an arm, two runs with one seed in an arm, runs
    of an arm that differ in more than the seed, and runs on different data.
    """
    studies = list(filter(is_study, folders))
    if studies and len(folders) > 1:
        raise ValueError(
            f"{studies[0]} is a study, which must be the only folder of a report: leave out the others, or name the "
            f"study's run folders, {shlex.quote(str(studies[0]))}/*/seed*"
        )
    results = _load_study(studies[0]) if studies else _load_runs(folders, base)
    results.about = tuple(about) or results.about
    results.cells = [cell for cell in results.all_cells if cell.all_runs]
    if not results.cells:
        folder, why = [*results.unfinished, *((folder, "not started") for _, folder in results.later)][0]
        raise ValueError(f"there is nothing to report, since no run is finished: {folder} is {why}")
    if control is not None:
        if control not in results.arms:
            arms = ", ".join(results.arms)
            raise ValueError(f"control must be an arm with a finished run (one of {arms}), got {control!r}")
        for cell in results.cells:
            cell.control = control
    _check_same_data(results)
    results.unfinished += [(folder, "not started") for cell, folder in results.later if cell in results.chosen]
    return results


def _load_study(folder):
    content = read_study(folder)
    results = Results(content["name"], content["grid"], cells=[], unfinished=[], command=content.get("command"))
    results.base = folder
    results.tuning_seeds = tuple(seed for seed in content.get("tuning_seeds", ()) if seed in content["seeds"])
    results.equal_within, results.about = content.get("equal_within"), content.get("about")
    for entry in content["arms"]:
        cell = Cell(entry["arm"], entry["point"], entry["control"], entry.get("configured", {}))
        results.all_cells.append(cell)
        for seed in content["seeds"]:
            path = run_folder(folder, entry["name"], seed)
            run = read_run(path)
            if run is None and results.tuning_seeds and seed not in results.tuning_seeds:
                results.later.append((cell, path))
            elif run is None or run.summary is None:
                _add_unfinished(results, cell, path, run, state(path))
            else:
                _add_finished(cell, run, seed in results.tuning_seeds)
    return results


def chosen_names(folder, arm):
    """The names, as in study.json, of the points of an arm that a study's finished runs choose: at each size one."""
    results = _load_study(folder)
    results.cells = [cell for cell in results.all_cells if cell.all_runs]
    points = [cell.point for cell in results.chosen if cell.arm == arm]
    return [entry["name"] for entry in read_study(folder)["arms"] if entry["arm"] == arm and entry["point"] in points]


def _kind(run):
    """What the runs of an arm have in common: their options, and how these changed on the way."""
    return run.experiment, run.changes_text


def _load_runs(folders, base):
    groups = []  # lists of runs that differ only in the seed
    for folder in folders:
        run = read_run(folder)
        if run is None:
            raise ValueError(
                f"{folder} is neither a study nor a run: a study has study.json, a run has config.json and run.json"
            )
        same = (group for group in groups if _kind(group[0]) == _kind(run))
        group = next(same, None)
        if group is None:
            groups.append(group := [])
        group.append(run)
    names = _names(groups, base)
    title = f"{names[0]} and {len(names) - 1} more" if len(names) > 2 else " and ".join(names)
    results = Results(title, grid={}, cells=[], unfinished=[], base=base)
    for name, group in zip(names, groups, strict=True):
        cell = Cell(name, {}, names[0])
        results.all_cells.append(cell)
        for run in group:
            if run.summary is None:
                how = "diverged" if run_files.has_diverged(run.folder) else "not finished"
                _add_unfinished(results, cell, run.folder, run, how)
            else:
                _add_finished(cell, run)
    return results


def _add_unfinished(results, cell, folder, run, how):
    """List a run that is not finished, with its state; run: None where it was not started."""
    if run:
        how += f", step {run_files.last_step(folder):,} of {run.config['max_iters']:,}"
        how += f", options changed on the way: {run.changes_text}" if run.changes else ""
    results.unfinished.append((folder, how))
    cell.n_diverged += run_files.has_diverged(folder)


def _add_finished(cell, run, chooses=False):
    """Put a finished run into its cell; chooses: whether it only chooses the point."""
    runs = cell.tuning if chooses else cell.runs
    if run.seed in runs:
        seed, data_seed = run.seed
        raise ValueError(
            f"{runs[run.seed].folder} and {run.folder} both have seed {seed} (data_seed {data_seed}) of "
            f"{cell.label}, which must have each seed once: leave out one of them"
        )
    if cell.all_runs and run.experiment != cell.example.experiment:
        a, b = cell.example.experiment, run.experiment
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        raise ValueError(
            f"{cell.example.folder} and {run.folder} are runs of {cell.label}, which must differ only in the seed, but "
            f"they differ in {', '.join(names)}: repeat one of them"
        )
    if cell.all_runs and run.precision != cell.example.precision:
        raise ValueError(
            f"{cell.example.folder} was trained in {cell.example.precision} and {run.folder} in {run.precision}, but "
            f"runs of {cell.label} must have one dtype, since it changes the loss: repeat one of them with --dtype=…"
        )
    runs[run.seed] = run


def _names(groups, base):
    """A name for each group of runs: its folders' names without the seed, or the whole path where two names agree."""
    names = []
    for group in groups:
        folders = [run.folder.resolve() for run in group]
        name = os.path.commonprefix([folder.name for folder in folders])  # noqa: RUF071 (of names, not of paths)
        name = name.rstrip("0123456789") if len(group) > 1 else name
        if name.rstrip("0123456789") in ("", "seed"):  # folders as in a study: ARM/seed1
            name = folders[0].parent.name
        names.append(plain(re.sub(r"[-_.,= ]*(seed|(?<=[-_.,= ])s)?[-_.,= ]*$", "", name)).strip())
    pairs = zip(names, groups, strict=True)
    return [plain(str(named(group[0].folder, base))) if names.count(name) > 1 else name for name, group in pairs]


def _check_same_data(results):
    first = results.cells[0].example
    for _, run in results.runs:
        a, b = (r.facts["data"]["fingerprint"] for r in (first, run))
        if a != b:
            raise ValueError(
                f"{first.folder} and {run.folder} were trained on different data (fingerprints {a} and {b}), so their "
                "losses cannot be compared: make a report of each"
            )
