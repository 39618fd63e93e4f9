"""Run a study: arms × grid × seeds, each run a `train.py` of its own in a folder of its own.

python sweep.py config/study_lr.py config/quick.py --jobs=2        a study, at the size that quick.py sets
python sweep.py config/study_lr.py config/quick.py --dry_run       its commands, tokens and FLOPs; runs nothing
python sweep.py config/study_lr.py config/quick.py --watch=5       how its runs stand, from another terminal
python sweep.py config/study_lr.py --index=$SLURM_ARRAY_TASK_ID --of=$SLURM_ARRAY_TASK_COUNT

The first file is the study (it sets the fields of `Study` in studies/study_file.py), the others set a size; options of
train.py go to every run, whatever its arm says. The runs of the first are in out/study_lr-quick/ARM/seed1. The same
command again skips what is finished and goes on with what was interrupted; several at once share the work. All arms of
a seed come before the next seed, so that an unfinished study can be compared already. A run that diverged is not tried
again, since the same settings would end the same, unless its nonfinite.json is deleted.
"""

import dataclasses
import os
import shlex
from dataclasses import dataclass

import configurator
import data
from engine import run_files
from engine.files import read_json
from studies import status, store, study_file, workers
from studies.plan import check_folder, option_name, plan, share, study_folder
from train_config import TrainConfig

LOG_LINES = 8  # of a failed run, at the end


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
            study_file.check_seeds(self.seeds, "the command line")


def describe(runs):
    """What runs cost: number, tokens, FLOPs."""
    tokens, flops = sum(run.tokens for run in runs), sum(run.flops for run in runs)
    return f"{len(runs)} run{'s' * (len(runs) != 1)}, {tokens:,} tokens, {flops:.2e} training FLOPs"


def dry_run(runs):
    """Print each run's state, identity and command, and what all of them cost."""
    for run in runs:
        print(f"# {run.label}: {store.state(run.folder)}, {run_files.digest(dataclasses.asdict(run.config))}")
        print(shlex.join(run.command))
    print(f"# all: {describe(runs)}")
    left = [run for run in runs if store.state(run.folder) not in ("finished", "diverged")]
    if len(left) < len(runs):
        print(f"# left: {describe(left)}")


def visible_gpus():
    """The names of the GPUs that a run may see, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return (names or [str(number) for number in range(count)])[:count]


def sweep(cfg, options=()):
    """Run a study as cfg, a SweepConfig, says; options: arguments of train.py for every run. The exit status.

    0: all runs of this share are finished; 1: some failed or diverged; 130: stopped. Raises ValueError before the
    first of them starts.
    """
    folder = study_folder(cfg)
    if cfg.watch:
        status.watch(folder, cfg.watch)
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
    store.write_study(folder, content)
    print(f"{folder}: {describe(mine)}", flush=True)
    gpus = visible_gpus() if any(run.config.device in ("auto", "cuda") for run in mine) else []
    work = workers.Execution(mine, cfg.jobs or max(1, len(gpus)), gpus if len(gpus) > 1 else ())
    result = work.execute(cfg.fail_fast)
    for run, why in work.failed.items():
        log = run.folder / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        print("\n".join([f"{run.label}: {why}; the end of {log}:", *("    " + line for line in lines)]))
    for run in work.diverged:
        found = read_json(run.folder / "nonfinite.json") or {}
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
