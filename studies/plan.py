"""The runs of a study: its file and its size become commands with resolved configurations."""

import dataclasses
import itertools
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from engine import run_files
from engine.files import read_json
from engine.flops import cost
from studies import store, study_file
from train_config import TrainConfig

TRAIN = configurator.ROOT / "train.py"
NOT_AN_OPTION = ("seed", "out_dir", "resume", "eval_only")  # of a run: the sweep sets them


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a study."""

    name: str  # of its arm and point
    seed: int
    folder: Path
    arguments: list[str]  # of train.py
    config: TrainConfig  # what they resolve to

    @property
    def label(self):
        """Its folder's name within the study."""
        return f"{self.name}/seed{self.seed}"

    @property
    def command(self):
        """The words of the command line that starts it."""
        return [sys.executable, os.path.relpath(TRAIN), *self.arguments]

    @property
    def tokens(self):
        """How many it trains on."""
        return self.config.max_iters * self.config.tokens_per_step

    @property
    def flops(self):
        """Operations of its training; see cost.cost."""
        return self.tokens * cost(self.config.model_config()).training_flops

    @property
    def progress(self):
        """The share of its steps that its files say are done."""
        return (
            1.0
            if run_files.is_finished(self.folder)
            else run_files.last_step(self.folder) / max(1, self.config.max_iters)
        )


def plan(cfg, options):
    """A study's runs, in the order in which they should run, and the content of study.json but for its format.

    options: arguments of train.py for every run. Resolves and validates each run's configuration; touches no file.
    Raises ValueError for the first mistake, and for two runs that would be the same.
    """
    path, *sizes = cfg.files
    this = study_file.read_file(path)
    fields = configurator.field_types(TrainConfig)
    size = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    size |= configurator.read(TrainConfig, [*sizes, *options])

    def fill(text):
        try:
            return text.format_map(size)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: {text!r}: {{…}} must hold a field of train.py, such as {{n_embd}}") from error

    grid, brings = {}, {}  # field -> its values; (field, value) -> arguments that come with the value
    for name, values in this.grid.items():
        configurator.known(name, fields, f"{path}: grid")
        if name in NOT_AN_OPTION:
            raise ValueError(f"{path}: grid: {name} is what the sweep sets for each run")
        for value in values:
            read = configurator.from_text(fill(value), fields[name]) if isinstance(value, str) else value
            read = configurator.coerce(name, read, fields[name], f"{path}: grid")
            grid.setdefault(name, []).append(read)
            brings[name, read] = shlex.split(fill(values[value])) if isinstance(values, dict) else []

    in_grid = [*grid, *(option_name(word) for words in brings.values() for word in words)]
    for name in map(option_name, options):
        if name in (*NOT_AN_OPTION, *in_grid):
            why = f"in the grid of {path}: change it there" if name in in_grid else "what the sweep sets for each run"
            raise ValueError(f"--{name} is {why}")

    entries = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        for arm, arguments in this.arms.items():
            name = ",".join([arm, *(f"{key}={as_text(value)}" for key, value in point.items())])
            arguments = [*sizes, *shlex.split(fill(arguments)), *shlex.split(fill(this.settings))]
            try:
                own = size | configurator.read(TrainConfig, [*arguments, *options])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            for key, value in point.items():
                arguments += [f"--{key}={as_text(value)}", *brings[key, value]]
            arguments += options
            entry = {"name": name, "arm": arm, "control": this.control[arm], "point": point, "arguments": arguments}
            entries.append(entry | {"configured": {key: own[key] for key in point}})

    folder = study_folder(cfg)
    seeds = this.seeds if cfg.seeds is None else cfg.seeds
    runs = [make_run(folder, entry, seed) for seed in seeds for entry in entries]
    seen = {}
    for run in runs:
        other = seen.setdefault(run_files.digest(dataclasses.asdict(run.config)), run)
        if other is not run:
            raise ValueError(
                f"{path}: {other.label} and {run.label} are the same run with these options: leave one of them out"
            )
    controls = set(this.control.values())
    of_seeds = [f"--seeds={','.join(map(str, cfg.seeds))}"] if cfg.seeds else []
    content = {
        "name": folder.name,
        "command": shlex.join(["python", "sweep.py", *cfg.files, *options, *of_seeds]),
        "control": controls.pop() if len(controls) == 1 else None,
        "seeds": list(seeds),
        "grid": grid,
        "arms": entries,
    }
    return runs, content


def share(runs, entries, index, of):
    """The runs of one of `of` shares of a plan: an arm, its control and what else is compared with that together.

    entries: those of study.json, of which the plan has the runs of one seed after those of another. Single runs are
    shared out only where there are fewer such groups than shares.
    """
    control = {entry["arm"]: entry["control"] for entry in entries}
    groups = {}
    for i, run in enumerate(runs):
        entry = entries[i % len(entries)]
        chain = [entry["arm"]]
        while control[chain[-1]] not in chain:
            chain.append(control[chain[-1]])
        root = min(chain[chain.index(control[chain[-1]]) :])  # of a ring: arms may be each other's control
        groups.setdefault((run.seed, str(entry["point"]), root), []).append(run)
    if len(groups) >= of:
        return [run for group in list(groups.values())[index::of] for run in group]
    ends = [len(runs) * i // of for i in (index, index + 1)]
    return [run for group in groups.values() for run in group][slice(*ends)]


def make_run(folder, entry, seed):
    """The Run of an entry of study.json with a seed. Raises ValueError when its configuration is not valid."""
    place = store.run_folder(folder, entry["name"], seed)
    arguments = [*entry["arguments"], f"--seed={seed}", f"--out_dir={place}", "--resume"]
    try:
        config = TrainConfig(**configurator.read(TrainConfig, arguments))
        if config.wandb_log and not config.wandb_run_name:  # the folder's name, seed1, is that of others, too
            arguments.append(f"--wandb_run_name={folder.name}/{entry['name']}/seed{seed}")
    except ValueError as error:
        raise ValueError(f"{entry['name']}: {error}") from error
    return Run(entry["name"], seed, place, arguments, config)


def as_text(value):
    """A value as an option of the command line has it, and a folder's name."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def option_name(argument):
    """The field that an argument such as --seed=3 sets."""
    return argument.removeprefix("--").partition("=")[0]


def study_folder(cfg):
    """Where the study of a SweepConfig is."""
    if not cfg.files and not (cfg.watch and cfg.out_dir):
        raise ValueError("name a study: python sweep.py config/study_table2.py config/quick.py")
    return Path(cfg.out_dir or "out/" + "-".join(Path(path).stem for path in cfg.files))


def check_folder(run):
    """Raise ValueError if a run's folder holds another run, saying what differs."""
    stored = read_json(run.folder / "config.json")
    if stored is None:
        return
    try:  # through TrainConfig, so that fields that did not exist then have their defaults
        there = TrainConfig(**configurator.read(TrainConfig, [], base=stored))
    except ValueError as error:
        raise ValueError(f"{run.folder}/config.json: {error}; remove the folder, or set another --out_dir=…") from error
    there, here = (run_files.identity(dataclasses.asdict(config)) for config in (there, run.config))
    differences = [f"{name} is {there[name]} there and {here[name]} here" for name in here if there[name] != here[name]]
    if differences:
        raise ValueError(
            f"{run.folder} holds another run: {'; '.join(differences)}. Give this study a folder of its own with "
            f"--out_dir=…, or remove that run"
        )
