"""The command `python -m tests.faults`; see the package's docstring."""

import functools
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, fields

import torch

import configurator
from engine import devices, files, locks, runlog
from studies import page

from . import __doc__ as usage
from . import children, damage, endurance, full_disks, names, options, preparing, sweeping, training

SHOWN = 5  # failed trials of a kind that the report describes
INTRODUCTION = """\
# Reliability

What is tried here must never cost more than the work since the last checkpoint, and must end in the same bits as an
undisturbed run, or in one line that says what to do. Made on {date}, {processor}, 1 thread, {versions}, commit
{commit}, in {minutes:.0f} minutes, by

```sh
{command}
```

A trial survives if the command, repeated with `--resume` where it has that, ends in the same files as an undisturbed
one: weights, optimizer state, metrics, losses, best.pt, the checkpoints of save_steps, bins, bit for bit (times are not
compared). A moment is before each file event (opening for writing, write, fsync, truncate, rename, link, unlink, mkdir,
rmdir), in the middle of each write, and at the end. A power cut loses all content that no fsync of its file has saved,
and all names that no fsync of their folder has saved, or any part of both. Here checkpoints are 5 or 10 steps apart,
and the commits of a preparation 32 kB of text; by default these are 1,000 steps and 256 MB.
"""


@dataclass
class FaultsConfig:
    """How many trials of each kind; 0: none."""

    # training
    kills: int = 200  # SIGKILL at a moment; every fourth trial kills the resumed run, too
    power_cuts: int = 200  # unflushed content and names are lost, wholly or in part
    signals: int = 80  # SIGINT or SIGTERM, once or twice
    double_starts: int = 20  # the same run started twice at once
    double_resumes: int = 20  # the same run resumed twice at once

    # other commands
    prepare_kills: int = 100  # prepare_owt.py
    prepare_power_cuts: int = 100  # prepare_owt.py
    sweep_kills: int = 50  # sweep.py, or one of its runs, in turns
    full_disks: int = 30  # sizes of a full disk, and a read-only folder, in each command that writes
    names: int = len(names.NAMES)  # hostile names of runs and datasets in a report
    options: int = 5000  # calls of all commands with wrong options

    # damage
    flips: int = 200  # checkpoints with one wrong bit
    truncations: int = 200  # checkpoints that are cut short

    # endurance
    steps: int = 10_000  # of one run whose memory is watched
    large_data: int = endurance.LARGE  # bytes of a sparse train.bin

    # all
    only: tuple[str, ...] = ()  # the kinds of trials, by their options' names; none: all
    seed: int = 0  # of the moments, sizes, bits and options
    out: configurator.FilePath = "out/reliability.md"  # where the table is written

    def __post_init__(self):
        counts = [field.name for field in fields(self) if field.name not in ("only", "out")]
        configurator.require(self, not_negative=" ".join(counts))
        for name in self.only:
            configurator.known(name, {each.name for each in KINDS}, "--only")


@dataclass(frozen=True)
class Kind:
    """A kind of trials. run(folder, n, rng) yields (what was tried, what is wrong or '', what was lost) of each."""

    name: str  # of the option for their number
    fault: str
    run: object
    lost: object = None  # from the values of what was lost to a text


def steps(values):
    """What training loses."""
    return f"at most {max(values)} steps, those since the last checkpoint (median {statistics.median(values):g})"


def documents(values):
    """What a preparation loses."""
    return f"at most {max(values)} documents, those since the last commit (median {statistics.median(values):g})"


def counts(values):
    """How often each thing became of a trial."""
    return ", ".join(f"{what}: {count:,}" for what, count in Counter(values).most_common())


def nothing(values):
    """Nothing is lost."""
    return "nothing"


DISKS = [
    Kind(
        "full_disks",
        f"{name}: full disk, or read-only",
        functools.partial(full_disks.full_disks, name=name),
        nothing,
    )
    for name in full_disks.NAMES
]
KINDS = [
    Kind("kills", "train: SIGKILL at any moment", training.kills, steps),
    Kind("power_cuts", "train: power cut at any moment", training.power_cuts, steps),
    Kind("signals", "train: SIGINT or SIGTERM, once or twice, at any moment", training.signals, steps),
    Kind("double_starts", "train: two starts at once", training.double_starts, nothing),
    Kind(
        "double_resumes",
        "train: two resumes at once",
        functools.partial(training.double_starts, resuming=True),
        nothing,
    ),
    Kind("prepare_kills", "prepare_owt: SIGKILL at any moment", preparing.kills, documents),
    Kind("prepare_power_cuts", "prepare_owt: power cut at any moment", preparing.power_cuts, documents),
    Kind("sweep_kills", "sweep: SIGKILL of the sweep or a run at any moment", sweeping.kills, nothing),
    *DISKS,
    Kind("flips", "checkpoint: one wrong bit", functools.partial(damage.damages, kind="flip"), counts),
    Kind("truncations", "checkpoint: cut short", functools.partial(damage.damages, kind="truncation"), counts),
    Kind("names", "report: hostile names", names.hostile_names, nothing),
    Kind("options", "all commands: wrong options", options.wrong_options, counts),
    Kind("steps", "train: many steps, resident memory", endurance.memory, "; ".join),
    Kind("large_data", "train: a train.bin of many GB", endurance.large_data, "; ".join),
]


def carry_out(kind, n, seed):
    """(row of the table, texts of the trials that failed) of n trials of a Kind."""
    tried, failed, lost, began = 0, [], [], time.monotonic()
    with children.trial_folder() as folder:
        for what, wrong, loss in kind.run(folder, n, random.Random(f"{seed}-{kind.fault}")):
            tried += 1
            failed += [f"{kind.fault}, {what}: {wrong}"] if wrong else []
            lost += [] if loss is None or wrong else [loss]
    command = f"--only={kind.name} --{kind.name}={n}" + (f" --seed={seed}" if seed else "")
    text = kind.lost(lost) if lost else "nothing" if not failed else "see below"
    seconds = time.monotonic() - began
    print(f"{kind.fault}: {tried - len(failed)} of {tried} survived in {seconds:.0f} s; {text}", flush=True)
    return [kind.fault, f"{tried:,}", f"{tried - len(failed):,}", text, command], failed


def main(argv):
    """The command; its exit status is 1 if a trial failed."""
    cfg = configurator.parse(FaultsConfig, argv) if not {"--help", "-h"} & {*argv} else _help()
    torch.set_num_threads(1)  # of this process, before the first fork
    began, rows, failed = time.monotonic(), [], []
    for kind in KINDS:
        n = getattr(cfg, kind.name)
        if n and (not cfg.only or kind.name in cfg.only):
            row, texts = carry_out(kind, n, cfg.seed)
            rows.append(row)
            failed += texts[:SHOWN]
    head = ["fault", "times tried", "times survived", "what was lost", "command: python -m tests.faults …"]
    table = page.Table(head, rows, words=(head[0], *head[3:])).markdown()
    facts = {"date": locks.now()[:10], "processor": devices.device_name(torch.device("cpu"))}
    facts |= {"versions": f"torch {torch.__version__}", "commit": runlog.git_commit()}
    facts |= {"minutes": (time.monotonic() - began) / 60, "command": " ".join(["python -m tests.faults", *argv])}
    parts = [INTRODUCTION.format(**facts), table]
    if failed:
        parts.append("\n".join(["Not survived:", "", *(f"- {page.escaped(text)}" for text in failed)]))
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    files.make_folder(configurator.Path(cfg.out).parent)
    files.write_text(cfg.out, text)
    print(f"\n{table}\n\n{cfg.out}")
    return int(bool(failed))


def _help():
    print(configurator.describe(FaultsConfig, usage))
    raise SystemExit(0)


if __name__ == "__main__":
    configurator.run(main)
