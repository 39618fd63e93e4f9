"""The runs of a study: its file and its size become `train.py` commands with resolved configurations."""

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
import data
from engine import checkpoint, resuming, run_files
from engine.files import read_json
from engine.flops import cost
from studies import store, study_file
from studies.options import without_replaced
from train_config import TrainConfig

TRAIN = configurator.ROOT / "train.py"
MAX_NAME = 255  # bytes in the name of a folder, on all usual file systems


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of a study, as it is to be started."""

    name: str  # of its arm and point of the grid: 'reduced,n_embd=64'
    seed: int
    folder: Path
    arguments: list[str]  # of train.py
    config: TrainConfig  # what the arguments resolve to
    first_step: int = 0  # a branch begins where its origin was saved

    @property
    def label(self):
        """The run's folder within the study's: 'reduced,n_embd=64/seed1'."""
        return f"{self.name}/seed{self.seed}"

    @property
    def log(self):
        """The file with the output of the run's processes."""
        return self.folder / "log.txt"

    @property
    def command(self):
        """The command that starts the run, as a list of words."""
        return [sys.executable, os.path.relpath(TRAIN), *self.arguments]

    @property
    def tokens(self):
        """The number of tokens that the run itself trains on."""
        return (self.config.max_iters - self.first_step) * self.config.tokens_per_step

    @property
    def flops(self):
        """The floating-point operations of the training; see engine.flops.cost."""
        return self.tokens * cost(self.config.model_config()).training_flops

    @property
    def progress(self):
        """The fraction of the run's own steps that its files show as done."""
        if run_files.is_finished(self.folder):
            return 1.0
        done = max(0, run_files.last_step(self.folder) - self.first_step)
        return done / max(1, self.config.max_iters - self.first_step)


def planned_runs(cfg, options):
    """A study's runs, in the order in which they should be started, and the content of study.json but for its format.

    cfg: a SweepConfig. options: arguments of train.py for every run. Resolves and validates each run's configuration;
    writes no file. Raises ValueError for the first mistake, and for two runs that would be the same.
    """
    path, *sizes = cfg.files
    study = study_file.read_file(path)
    size = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    size |= configurator.read(TrainConfig, [*sizes, *options])
    points = study.points(size)
    in_grid = [*points[0][0], *points[0][1]]
    for name in map(option_name, options):
        if name in study_file.RESERVED:
            raise ValueError(f"--{name} cannot be an option of a study: the sweep sets it for each run")
        if name in in_grid:
            raise ValueError(f"--{name} is in the grid of {path}: change it there")

    entries = []
    for axes, more in points:
        of_point = [f"--{key}={as_text(value)}" for key, value in (axes | more).items()]
        for arm in study.arms:
            name = ",".join([arm, *(f"{key}={as_text(value)}" for key, value in axes.items())])
            check_name(name, f"{path}: the arm {arm}")
            arguments = [*sizes, *study.arguments(arm, size)]
            try:
                own = size | configurator.read(TrainConfig, [*arguments, *options])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            entry = {"name": name, "arm": arm, "control": study.control[arm], "point": axes}
            entry |= {"arguments": [*arguments, *of_point, *options], "configured": {key: own[key] for key in axes}}
            entries.append(entry)

    folder = study_folder(cfg)
    seeds = study.seeds if cfg.seeds is None else cfg.seeds
    runs = [planned_run(folder, entry, seed) for seed in seeds for entry in entries]
    seen = {}
    for run in runs:
        identity = run_files.digest(without_replaced(dataclasses.asdict(run.config)))
        other = seen.setdefault((identity, run.config.branch_from), run)
        if other is not run:
            raise ValueError(
                f"{path}: {other.label} and {run.label} are the same run with these options: remove one of them"
            )
    controls = set(study.control.values())
    of_seeds = [f"--seeds={','.join(map(str, cfg.seeds))}"] if cfg.seeds else []
    content = {
        "name": folder.name,
        "command": shlex.join(["python", "sweep.py", *cfg.files, *options, *of_seeds]),
        "control": controls.pop() if len(controls) == 1 else None,
        "seeds": list(seeds),
        "grid": {name: list(dict.fromkeys(axes[name] for axes, _ in points)) for name in points[0][0]},
        "arms": entries,
        "tuning_seeds": list(study.tuning_seeds),
        "equal_within": study.equal_within,
        "about": list(study.about) or differing([run.config for run in runs[: len(entries)]]),
    }
    return runs, content


def differing(configs):
    """The options, other than seeds, that determine a run's result and are not the same in all TrainConfigs."""
    identities = [run_files.identity(dataclasses.asdict(config)) for config in configs]
    names = (name for name in identities[0] if name not in ("seed", "data_seed"))
    return [name for name in names if len({repr(each[name]) for each in identities}) > 1]


def planned_run(folder, entry, seed):
    """The PlannedRun of an entry of study.json with a seed. Raises ValueError when its configuration is not valid."""
    place = store.run_folder(folder, entry["name"], seed)
    own = [text.replace("{arm}", entry["arm"]).replace("{seed}", str(seed)) for text in entry["arguments"]]
    arguments = [*own, f"--seed={seed}", f"--out_dir={place}", "--resume"]
    try:
        given = configurator.read(TrainConfig, arguments)
        base = resuming.branch_options(given)
        if given.get("init_from", resuming.SCRATCH) != resuming.SCRATCH:
            base |= checkpoint.model_options(given["init_from"])
        values = configurator.read(TrainConfig, arguments, base=base)
        config = TrainConfig(**data.with_vocabulary(values, TrainConfig))
    except ValueError as error:
        raise ValueError(f"{entry['name']}: {error}") from error
    if "vocab_size" not in values and config.vocab_size != TrainConfig.vocab_size:
        arguments.append(f"--vocab_size={config.vocab_size}")  # what was planned, whatever the data becomes
    if config.wandb_log and not config.wandb_run_name:  # else it would be the folder's name, and all runs 'seed1'
        arguments.append(f"--wandb_run_name={folder.name}/{entry['name']}/seed{seed}")
    first_step = checkpoint.step(config.branch_from) if config.branch_from else 0
    if first_step > config.max_iters:
        raise ValueError(
            f"{entry['name']}: {config.branch_from} is at step {first_step}, after max_iters={config.max_iters}: raise "
            "max_iters, or branch from an earlier checkpoint"
        )
    return PlannedRun(entry["name"], seed, place, arguments, config, first_step)


def runs_of_array_job(runs, entries, array_index, array_size):
    """The runs that one job of a job array works on, of array_size jobs; array_index is from 0.

    An arm, its control and all arms with the same control go to one job, so that each job's results can be compared.
    Single runs are dealt out only where there are fewer such groups than jobs.
    entries: those of study.json; runs has one run for each of them with the first seed, then with the second, …
    """
    control = {entry["arm"]: entry["control"] for entry in entries}
    groups = {}
    for i, run in enumerate(runs):
        entry = entries[i % len(entries)]
        chain = [entry["arm"]]  # the arm, its control, the control's control, …
        while control[chain[-1]] not in chain:
            chain.append(control[chain[-1]])
        root = min(chain[chain.index(control[chain[-1]]) :])  # one name for a ring: arms may be each other's control
        groups.setdefault((run.seed, str(entry["point"]), root), []).append(run)
    if len(groups) >= array_size:
        return [run for group in list(groups.values())[array_index::array_size] for run in group]
    in_order = [run for group in groups.values() for run in group]
    begin, end = (len(runs) * i // array_size for i in (array_index, array_index + 1))
    return in_order[begin:end]


def check_name(name, what):
    """Raise ValueError unless the name of an arm and point can be that of a folder; what: the arm, for the message."""
    if "/" in name or not name.isprintable():
        raise ValueError(
            f"{what} must have a folder's name without / and line feeds at each point of the grid, got {name!r}: give "
            "such a value an arm of its own"
        )
    if (n_bytes := len(name.encode())) > MAX_NAME:
        raise ValueError(
            f"{what} must have a folder's name of at most {MAX_NAME} bytes at each point of the grid, got {n_bytes}: "
            f"shorten it, or the grid's values ({name[:60]}…)"
        )


def as_text(value):
    """A value as the command line has it, and the name of a folder."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value)


def option_name(argument):
    """The field that an argument such as --seed=3 sets."""
    return argument.removeprefix("--").partition("=")[0]


def study_folder(cfg):
    """The folder of the study that a SweepConfig names."""
    if not cfg.files and not (cfg.watch and cfg.out_dir):
        raise ValueError("name a study: python sweep.py config/study_table2.py config/quick.py")
    return Path(cfg.out_dir or "out/" + "-".join(Path(path).stem for path in cfg.files))


def check_folder(run):
    """Raise ValueError if the folder of a PlannedRun holds a different run, saying what differs."""
    path = run.folder / run_files.CONFIG
    stored = read_json(path)
    if stored is None:
        return
    try:  # through TrainConfig, so that fields that did not exist then have their defaults
        there = TrainConfig(**configurator.read(TrainConfig, [], base=stored))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove that folder, or choose another --out_dir=…") from error
    there, here = (
        run_files.identity(dataclasses.asdict(config)) | {"branch_from": config.branch_from}
        for config in (there, run.config)
    )
    differences = [f"{name} is {there[name]} there and {here[name]} here" for name in here if there[name] != here[name]]
    if differences:
        raise ValueError(
            f"{run.folder} already contains a different run ({'; '.join(differences)}): choose another --out_dir=…, or "
            "remove that folder"
        )
