"""Run a study: arms × grid × seeds, each run a `train.py` process with a folder of its own.

python sweep.py config/study_lr.py config/quick.py                 a study, at the size that quick.py sets
python sweep.py config/study_lr.py config/quick.py --dry_run       print commands, tokens, FLOPs and time; run nothing
python sweep.py config/study_lr.py config/quick.py --watch=5       show the state of its runs, from another terminal
python sweep.py config/study_lr.py --array_index=$SLURM_ARRAY_TASK_ID --array_size=$SLURM_ARRAY_TASK_COUNT

The first file is the study (it sets the fields of `Study` in studies/study_file.py), the others set a size; options of
train.py go to every run, whatever its arm sets. The runs of the first command are in out/study_lr-quick/ARM/seed1, …
Repeating a command skips the runs that are finished and resumes those that were interrupted; the same command can run
several times at once, and no run is done twice. All arms of a seed come before the next seed, so that an unfinished
study can be compared already. A run that diverged would diverge again with the same settings, so it is not tried again
unless its nonfinite.json is deleted. Where the study's file has tuning_seeds, the other seeds are trained at the points
that these choose, and nowhere else.
"""

import dataclasses
import functools
import os
import shlex
from dataclasses import dataclass

import configurator
import data
from engine import devices, run_files, signals
from engine.files import read_json
from engine.flops import cost
from studies import status, store, study_file, tuning, workers
from studies.plan import check_folder, option_name, planned_runs, runs_of_array_job, study_folder
from train_config import TrainConfig

LOG_LINES = 8  # of a failed run's log, which are printed at the end
OLD_NAMES = {"--index": "--array_index", "--of": "--array_size"}


@dataclass
class SweepConfig:
    """How a study is run. Options of train.py may stand beside these, and go to every run."""

    files: tuple[str, ...] = ()  # the study's file, then files that set a size; given without --files=
    out_dir: configurator.FilePath | None = None  # the study's folder; none: out/ and the names of the files
    seeds: tuple[int, ...] | None = None  # in place of the study's own, for example 4,5 for two more
    jobs: int | None = None  # runs at a time; none: one for each GPU, or on a CPU one for each core
    array_index: int = 0  # the number of this job in a job array, from 0; --index is an alias
    array_size: int = 1  # the number of jobs in the array, which divide the runs between them; --of is an alias
    dry_run: bool = False  # print commands, tokens, FLOPs and how long they take, and run nothing
    max_seconds: float | None = None  # of this process, after which it stops its runs, with checkpoints; none: no limit
    fail_fast: bool = False  # stop all runs when one fails; a run that diverges does not count as failed
    watch: float = 0.0  # seconds after which the state of the runs is shown again, running nothing; 0: off

    def __post_init__(self):
        configurator.require(self, positive="jobs array_size max_seconds", not_negative="watch")
        if not 0 <= self.array_index < self.array_size:
            raise ValueError(
                f"array_index must be from 0 to array_size - 1 = {self.array_size - 1}, got {self.array_index}"
            )
        if self.seeds is not None:
            study_file.check_seeds(self.seeds, "the command line")


def describe(runs, shares):
    """What runs cost, as text: their number, tokens and FLOPs. shares: of each the part expected to be needed."""
    n_runs = round(sum(shares[run] for run in runs))
    tokens, flops = (round(sum(shares[run] * getattr(run, what) for run in runs)) for what in ("tokens", "flops"))
    return f"{n_runs} {'run' if n_runs == 1 else 'runs'}, {tokens:,} tokens, {flops:.2e} training FLOPs"


def dry_run(runs, shares, jobs, folder):
    """Print each run's state, identity and command, and what all of them cost; folder: the study's."""
    states = {run: store.state(run.folder) for run in runs if shares[run]}
    for run, state in states.items():
        condition = "" if shares[run] == 1 else ", only if the tuning seeds choose its point"
        print(f"# {run.label}: {state}, {run_files.digest(dataclasses.asdict(run.config))}{condition}")
        print(shlex.join(run.command))
    print(f"# all: {describe(states, shares)}")
    remaining = [run for run, state in states.items() if state not in ("finished", "diverged")]
    if len(remaining) < len(states):
        print(f"# remaining: {describe(remaining, shares)}")
    if remaining:
        print(f"# {status.duration(remaining, shares, jobs, folder.parent)}")


def visible_gpus():
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return (names or [str(number) for number in range(count)])[:count]


def jobs_of_a_cpu(runs):
    """How many PlannedRuns a CPU does fastest side by side: one for each core, as far as half of the memory holds them.

    Two runs of one thread took 0.64 of the time of one after the other with two threads, at 4 × 128.
    """
    import torch

    memory = devices.memory_bytes(torch.device("cpu")) or 0
    largest = max(devices.TRAINING_BYTES * cost(run.config.model_config()).total for run in runs)
    return max(1, min(devices.available_cpus(), memory // 2 // max(largest, 2**30)))


def sweep(cfg, options=(), began=None):
    """Run a study as cfg, a SweepConfig, says; options: arguments of train.py for every run. Returns the exit status.

    0: all runs of this job are finished; 1: some failed or diverged; 130: a signal stopped them; 75: the end of
    max_seconds did, which count from began, a time.monotonic() (None: now). Raises ValueError for a mistake before the
    first run is started.
    """
    folder = study_folder(cfg)
    if cfg.watch:
        status.watch(folder, cfg.watch)
        return 0
    all_runs, content = planned_runs(cfg, list(options))
    runs = runs_of_array_job(all_runs, content["arms"], cfg.array_index, cfg.array_size)
    for run in all_runs:
        check_folder(run)
    gpus = visible_gpus() if any(run.config.device in ("auto", "cuda") for run in runs) else []
    jobs = cfg.jobs or len(gpus) or jobs_of_a_cpu(runs)
    if cfg.dry_run:
        earlier = store.read_study(folder)["seeds"] if store.is_study(folder) else []
        choice = tuning.Choice(folder, content | {"seeds": [*content["seeds"], *earlier]})
        dry_run(runs, choice.shares(runs), jobs, folder)
        return 0
    for place in {(run.config.data_dir, run.config.dataset) for run in runs}:
        data.load_bins(*place)  # raises here what every run would raise
    store.write_study(folder, content)
    choice = tuning.Choice(folder, store.read_study(folder))  # with the seeds of earlier calls
    print(f"{folder}: {describe(runs, choice.shares(runs))}", flush=True)
    execution = workers.Execution(runs, jobs, gpus if len(gpus) > 1 else (), choice)
    stop = signals.StopSignal(cfg.max_seconds, began)
    result = execution.execute(cfg.fail_fast, stop)
    print_outcome(execution, result, folder, stop)
    return {True: 0, False: 1, None: stop.exit_status}[result]


def print_outcome(execution, result, folder, stop):
    """Print which runs failed or diverged, and what to do next. result: that of Execution.execute with stop."""
    n_runs, n_failed, n_diverged = len(execution.runs), len(execution.failed), len(execution.diverged)
    for run, why in execution.failed.items():
        text = run.log.read_text(encoding="utf-8", errors="replace") if run.log.exists() else ""
        lines = ["    " + line for line in text.splitlines()[-LOG_LINES:]]
        print("\n".join([f"{run.label}: {why}; the last lines of {run.log}:", *lines]))
    for run in execution.diverged:
        path = run.folder / run_files.NONFINITE
        try:
            text = f"diverged at step {(read_json(path) or {}).get('step')}; see {path}"
        except ValueError as error:
            text = f"diverged; {error}"
        print(f"{run.label}: {text}")
    if n_diverged:
        print(f"{n_diverged} of {n_runs} runs diverged; to try one again, delete its {run_files.NONFINITE}")
    if result is None:
        print(f"stopped{stop.why}; repeat the command to continue")
    elif n_failed:
        print(f"{n_failed} of {n_runs} runs failed; repeat the command to try them again")
    elif execution.todo:
        n_left, awaited = len(execution.todo), execution.waits_for(execution.todo[0])[0]
        print(
            f"{n_left} runs are left, of which the tuning seeds choose some: repeat the command when {awaited} is done"
        )
    else:
        finished = f"{n_runs - n_diverged} of {n_runs}" if n_diverged else f"all {n_runs}"
        command = shlex.join(["python", os.path.relpath(configurator.ROOT / "report.py"), str(folder)])
        print(f"{finished} runs are finished; compare them with: {command}")


def main(argv, began=None):
    """The command; see the module's docstring. began: the time.monotonic() from which max_seconds counts; None: now."""
    own, fields = configurator.field_types(SweepConfig), configurator.field_types(TrainConfig)
    of_sweep, of_runs = [], []
    for argument in argv:
        name, equals, value = argument.partition("=")
        argument = OLD_NAMES.get(name, name) + equals + value
        name = option_name(argument)
        is_of_runs = argument.startswith("--") and name not in own and name != "help"
        if is_of_runs:
            configurator.known(name, own | fields, configurator.COMMAND_LINE)
        (of_runs if is_of_runs else of_sweep).append(argument)
    return sweep(configurator.parse(SweepConfig, of_sweep, positional="files"), of_runs, began)


if __name__ == "__main__":
    configurator.run(functools.partial(main, began=signals.process_start()))
