"""Run a study: arms × grid × seeds, each run a `train.py` of its own in a folder of its own.

python sweep.py config/study_lr.py config/quick.py --jobs=2        a study, at the size that quick.py sets
python sweep.py config/study_lr.py config/quick.py --dry_run       its commands, tokens and FLOPs; runs nothing
python sweep.py config/study_lr.py config/quick.py --watch=5       how its runs stand, from another terminal
python sweep.py config/study_lr.py --index=$SLURM_ARRAY_TASK_ID --of=$SLURM_ARRAY_TASK_COUNT

The first file is the study (it sets the fields of `Study` in study.py), the others set a size; options of train.py go
to every run, whatever its arm says. The runs of the first are in out/study_lr-quick/ARM/seed1. The same command again
skips what is finished and goes on with what was interrupted; several at once share the work. All arms of a seed come
before the next seed, so that an unfinished study can be compared already. A run that diverged is not tried again, since
the same settings would end the same, unless its nonfinite.json is deleted.
"""

import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import configurator
import data
import runlog
import study
from cost import cost
from train_config import TrainConfig

TRAIN = Path(__file__).resolve().with_name("train.py")
LOG_LINES = 8  # of a failed run, at the end
NOT_AN_OPTION = ("seed", "out_dir", "resume", "eval_only")  # of a run: the sweep sets them
COLUMNS = {  # of the watch view: key of a row -> heading, format
    "run": ("run", "{}"),
    "state": ("state", "{}"),
    "step": ("step", "{:,}"),
    "val_loss": ("val. loss", "{:.4f}"),
    "difference": ("vs control", "{:+.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


@dataclass
class SweepConfig:
    """How a study is run. Options of train.py may stand beside these, and go to every run."""

    files: tuple[str, ...] = ()  # the study's file, then files that set a size, given without --
    out_dir: str | None = None  # the study's folder; none: out/ and the names of the files
    seeds: tuple[int, ...] | None = None  # in place of the study's, such as 4,5 for two more
    jobs: int | None = None  # runs side by side; none: one for each GPU, or one on a CPU
    index: int = 0  # which share to run, from 0: that of a job in a cluster's array, of all arms where there are enough
    of: int = 1  # the number of such shares
    dry_run: bool = False  # print commands, tokens and FLOPs, and run nothing
    fail_fast: bool = False  # stop everything when a run fails; to diverge is not to fail
    watch: float = 0.0  # show how the study stands every so many seconds, and run nothing; 0: off

    def __post_init__(self):
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be positive, not {self.jobs}")
        if not 0 <= self.index < self.of:
            raise ValueError(f"index={self.index} must be at least 0 and below of={self.of}")
        if self.watch < 0:
            raise ValueError(f"watch must be a number of seconds, not {self.watch}")
        if self.seeds is not None:
            study.check_seeds(self.seeds, "the command line")


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
        return 1.0 if study.is_finished(self.folder) else study.last_step(self.folder) / max(1, self.config.max_iters)


def plan(cfg, options):
    """A study's runs, in the order in which they should run, and the content of study.json but for its format.

    options: arguments of train.py for every run. Resolves and validates each run's configuration; touches no file.
    Raises ValueError for the first mistake, and for two runs that would be the same.
    """
    path, *sizes = cfg.files
    this = study.read_file(path)
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
        other = seen.setdefault(study.digest(dataclasses.asdict(run.config)), run)
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
    place = study.run_folder(folder, entry["name"], seed)
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
    stored = runlog.read_json(run.folder / "config.json")
    if stored is None:
        return
    try:  # through TrainConfig, so that fields that did not exist then have their defaults
        there = TrainConfig(**configurator.read(TrainConfig, [], base=stored))
    except ValueError as error:
        raise ValueError(f"{run.folder}/config.json: {error}; remove the folder, or set another --out_dir=…") from error
    there, here = (study.identity(dataclasses.asdict(config)) for config in (there, run.config))
    differences = [f"{name} is {there[name]} there and {here[name]} here" for name in here if there[name] != here[name]]
    if differences:
        raise ValueError(
            f"{run.folder} holds another run: {'; '.join(differences)}. Give this study a folder of its own with "
            f"--out_dir=…, or remove that run"
        )


def describe(runs):
    """What runs cost: number, tokens, FLOPs."""
    tokens, flops = sum(run.tokens for run in runs), sum(run.flops for run in runs)
    return f"{len(runs)} run{'s' * (len(runs) != 1)}, {tokens:,} tokens, {flops:.2e} training FLOPs"


def dry_run(runs):
    """Print each run's state, identity and command, and what all of them cost."""
    for run in runs:
        print(f"# {run.label}: {study.state(run.folder)}, {study.digest(dataclasses.asdict(run.config))}")
        print(shlex.join(run.command))
    print(f"# all: {describe(runs)}")
    left = [run for run in runs if study.state(run.folder) not in ("finished", "diverged")]
    if len(left) < len(runs):
        print(f"# left: {describe(left)}")


def visible_gpus():
    """The names of the GPUs that a run may see, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return (names or [str(number) for number in range(count)])[:count]


def rows(folder, content):
    """A dict for each run of a study, from its files alone; what is not known is None.

    run; state; step; val_loss: of the last evaluation, nats a token; difference: val_loss minus that of the control of
    the same seed and point at the same step; tokens_per_second: the last measured.
    """
    arm_at = {(entry["arm"], json.dumps(entry["point"])): entry["name"] for entry in content["arms"]}
    result = []
    for seed in content["seeds"]:
        metrics = {
            entry["name"]: runlog.read_metrics(study.run_folder(folder, entry["name"], seed))
            for entry in content["arms"]
        }
        losses = {
            name: {record["step"]: record["val_loss"] for record in records if record["kind"] == "eval"}
            for name, records in metrics.items()
        }
        for entry in content["arms"]:
            name, control = entry["name"], arm_at[entry["control"], json.dumps(entry["point"])]
            step, loss = next(reversed(losses[name].items()), (None, None))
            is_compared = name != control and step in losses[control]
            speeds = [record["tokens_per_second"] for record in metrics[name] if record["kind"] == "train"]
            result.append(
                {
                    "run": f"{name}/seed{seed}",
                    "state": study.state(study.run_folder(folder, name, seed)),
                    "step": metrics[name][-1]["step"] if metrics[name] else None,
                    "val_loss": loss,
                    "difference": loss - losses[control][step] if is_compared else None,
                    "tokens_per_second": speeds[-1] if speeds else None,
                }
            )
    return result


def view(name, table, width=None, height=None):
    """The text of a study's rows: a line of counts, then a line a run, cut to width and height where given.

    Where there are too many lines, the runs at work come first, and the number of those left out last.
    """
    counts = {state: sum(row["state"] == state for row in table) for state in study.STATES}
    shown = table
    if height and len(table) > height - 3:
        shown = sorted(table, key=lambda row: study.STATES.index(row["state"]))[: max(1, height - 4)]
    cells = [[heading for heading, _ in COLUMNS.values()]]
    cells += [
        ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in shown
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    excess = max(0, sum(widths) + 2 * (len(widths) - 1) - (width or math.inf))
    widths[0] -= min(excess, max(0, widths[0] - 12))  # a name loses its middle rather than a row its end
    lines = [f"{name}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)]
    for run, state, *numbers in cells:
        if len(run) > widths[0]:
            run = run[: widths[0] // 2] + "…" + run[len(run) - (widths[0] - 1) // 2 :]
        numbers = [text.rjust(column) for text, column in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join([run.ljust(widths[0]), state.ljust(widths[1]), *numbers]))
    if len(shown) < len(table):
        lines.append(f"… and {len(table) - len(shown)} more")
    return "\n".join(line[:width] for line in lines)


def watch(folder, seconds):
    """Show how a study's runs stand, anew every `seconds` until no more is to come; once where there is no terminal."""
    while True:
        content = study.read_study(folder)
        table = rows(folder, content)
        if not sys.stdout.isatty():
            print(view(content["name"], table))
            return
        size = shutil.get_terminal_size()
        print("\x1b[H\x1b[J" + view(content["name"], table, size.columns, size.lines), flush=True)
        if all(row["state"] in ("finished", "diverged") for row in table):
            return
        time.sleep(seconds)


def sweep(cfg, options=()):
    """Run a study as cfg, a SweepConfig, says; options: arguments of train.py for every run. The exit status.

    0: all runs of this share are finished; 1: some failed or diverged; 130: stopped. Raises ValueError before the
    first of them starts.
    """
    folder = study_folder(cfg)
    if cfg.watch:
        watch(folder, cfg.watch)
        return 0
    runs, content = plan(cfg, list(options))
    mine = share(runs, content["arms"], cfg.index, cfg.of)
    for run in runs:
        check_folder(run)
    if cfg.dry_run:
        dry_run(mine)
        return 0
    for place in {(run.config.data_dir, run.config.dataset) for run in mine}:
        data.load_bins(*place)  # raises where every run would
    study.write_study(folder, content)
    print(f"{folder}: {describe(mine)}", flush=True)
    gpus = visible_gpus() if any(run.config.device in ("auto", "cuda") for run in mine) else []
    work = study.Execution(mine, cfg.jobs or max(1, len(gpus)), gpus if len(gpus) > 1 else ())
    result = work.execute(cfg.fail_fast)
    for run, why in work.failed.items():
        log = run.folder / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        print("\n".join([f"{run.label}: {why}; the end of {log}:", *("    " + line for line in lines)]))
    for run in work.diverged:
        found = runlog.read_json(run.folder / "nonfinite.json") or {}
        print(f"{run.label}: diverged at step {found.get('step')}; see {run.folder / 'nonfinite.json'}")
    if work.diverged:
        print(
            f"{len(work.diverged)} of {len(mine)} runs diverged; the same command does not try one again unless you "
            "delete its nonfinite.json"
        )
    if result is None:
        print("stopped; the same command goes on")
        return 130
    if work.failed:
        print(f"{len(work.failed)} of {len(mine)} runs did not end; the same command tries them again")
        return 1
    finished = f"{len(mine) - len(work.diverged)} of {len(mine)}" if work.diverged else f"all {len(mine)}"
    print(f"{finished} runs are finished; compare them with: python report.py {folder}")
    return 0 if result else 1


def main(argv):
    """The command; see the module's docstring."""
    own, fields = configurator.field_types(SweepConfig), configurator.field_types(TrainConfig)
    mine, options = [], []
    for argument in argv:
        name = option_name(argument)
        is_of_runs = argument.startswith("--") and name not in own and name != "help"
        if is_of_runs:
            configurator.known(name, own | fields, "the command line")
        (options if is_of_runs else mine).append(argument)
    return sweep(configurator.parse(SweepConfig, mine, positional="files"), options)


if __name__ == "__main__":
    configurator.run(main)
