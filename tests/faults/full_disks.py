"""Full disks and read-only folders, in every command that writes."""

import shutil
from pathlib import Path

import torch
from conftest import write_dataset
from run_folders import write_study

import bench
import eliminate
import prepare_owt
import report
import train
from theory import basis_transfer

from . import children, preparing, sweeping, training
from .events import FileEvents

REASONS = ("No space left on device", "Read-only file system")
TRANSFER = "h=4 seeds=0 steps=4 batch=8 linear_samples=64 test_samples=32 out_dir=transfer device=cpu dtype=float32"
ARMS = {"baseline": {}, "reduced": dict(wq_identity=True)}


class Command:
    """A command that writes, the files that it needs, and what it writes in the end.

    origin: called with an empty folder, to fill. output: what it writes, a file or a folder.
    """

    def __init__(self, folder, main, argv, output, origin, setup=lambda: None):
        self.folder, self.main, self.argv, self.output, self.setup = Path(folder), main, argv, output, setup
        self.origin, self.trial = self.folder / "origin", self.folder / "trial"
        self.origin.mkdir()
        origin(self.origin)
        children.fresh(self.trial, self.origin)
        done = self.run()
        assert done.status == 0, done.describe()
        self.marks, self.expected = done.marks, self.result()

    def run(self, space=None, read_only=False):
        """Run it with space for so many bytes; its Outcome."""

        def prepare():
            events = FileEvents(self.trial)
            events.space, events.read_only = space, read_only
            self.setup()
            sweeping.EVENTS.append(events)
            return events

        return children.run(self.main, self.argv, self.trial, prepare)

    def result(self):
        """The files that it has written, with the content of those that have no times in them."""
        place = self.trial / self.output
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        names = [path for path in files if path.name not in ("log.txt", "run.json")]
        if place.is_dir() and any(path.name == "metrics.jsonl" for path in files):
            runs = {path.parent for path in files if path.name == "metrics.jsonl"}
            return {str(run.relative_to(self.trial)): training.result(run) for run in runs}
        plain = {path for path in names if path.suffix in (".md", ".csv", ".bin", ".html")}
        found = {str(path.relative_to(self.trial)): path.read_bytes() if path in plain else None for path in names}
        return found | {
            str(path.relative_to(self.trial)): training.content(torch.load(path, weights_only=True))["model"]
            for path in names
            if path.suffix == ".pt"
        }

    def refused(self, done):
        """What is wrong with the way in which the command ended on a disk without space; '' if nothing."""
        logs = [path.read_text() for path in self.trial.rglob("log.txt")]
        texts = [done.out, done.err, *logs]
        if any("Traceback" in text for text in texts):
            return f"a traceback ({done.describe()})"
        said = done.err if done.is_refusal else ""
        if self.main is sweeping.sweep.main and done.status == 1:  # it says which of its runs failed, and why
            said = done.out
        if not any(reason in said for reason in REASONS):
            return f"not the reason in one line ({done.describe()})"
        return "" if str(self.output).partition("/")[0] in said else f"no path ({done.describe()})"

    def trials(self, n, rng):
        """n sizes of the disk from 0 to what the command writes, then a read-only folder: (what, wrong, lost) each.

        Every second size ends it at the beginning of a file event or soon after.
        """
        used, n_near = self.marks[-1], (n + 1) // 2
        near = [min(used - 1, rng.choice(self.marks) + rng.choice((0, 1, 20))) for _ in range(n_near)]
        sizes = [*near, *(used * i // (n - n_near) for i in range(n - n_near))]
        for what, faults in [*((f"{size:,} of {used:,} bytes", dict(space=size)) for size in sizes), READ_ONLY]:
            children.fresh(self.trial, self.origin)
            done = self.run(**faults)
            wrong = "" if done.status == 0 and faults.get("space", 0) > 0.95 * used else self.refused(done)
            again = self.run()
            if again.status:
                wrong = wrong or f"with space it failed ({again.describe()})"
            elif not training.are_equal(self.result(), self.expected):
                wrong = wrong or "with space it ended in another result"
            yield what, wrong, None


READ_ONLY = ("read-only", dict(read_only=True))
NAMES = ("train", "prepare", "sweep", "report", "eliminate", "basis_transfer", "bench")


def write_run(folder, **changes):
    """A finished run of attention skips alone, whose W_Q can be eliminated."""
    write_dataset(folder / "data/tiny")
    changes |= dict(max_iters=5, warmup_iters=2, eval_interval=5, norm="none", mlp_skip=False, save_steps=())
    done = children.run(train.main, training.arguments(**changes), folder)
    assert done.status == 0, done.describe()
    for path in folder.parent.glob(f"{folder.name}.child.*"):
        path.unlink()


def write_sweep(folder):
    """What a sweep needs."""
    write_dataset(folder / "data/tiny", n_train=1000, n_val=200)
    (folder / "study.py").write_text(sweeping.STUDY)
    (folder / "tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in sweeping.SIZE.items()))


def sweeps(folder):
    """The set-up of a sweep whose runs are forks."""

    def setup():
        ledger = Path(folder) / "ledger"
        shutil.rmtree(ledger, ignore_errors=True)
        ledger.mkdir()
        sweeping.ForkedRun.ledger = ledger
        sweeping.workers.POLL_SECONDS = 0.01
        sweeping.workers.subprocess.Popen = sweeping.ForkedRun

    return setup


def commands(folder):
    """name -> function that makes the Command, in a folder of its own."""
    short = training.arguments(max_iters=20, eval_interval=10, save_steps=(15,))

    def losses(arm, seed):
        return 3 + seed / 100 + (arm == "reduced") / 10

    def study(place):
        write_study(place / "study", ARMS, losses, seeds=(1, 2))

    def texts(place):
        preparing.write_texts(place / "texts")

    def tiny(place):
        write_dataset(place / "data/tiny")

    return {
        "train": (train.main, [*short, "--resume"], "run", tiny),
        "prepare": (prepare_owt.main, preparing.ARGUMENTS, "data/mine", texts, preparing.small_pieces),
        "sweep": (sweeping.sweep.main, sweeping.ARGUMENTS, "study", write_sweep, sweeps(folder)),
        "report": (report.main, ["study", "--out_dir=report"], "report", study),
        "eliminate": (eliminate.main, ["--ckpt=run/ckpt.pt", "--out=new/ckpt.pt"], "new", write_run),
        "basis_transfer": (
            basis_transfer.main,
            [*(f"--{option}" for option in TRANSFER.split()), "--resume"],
            "transfer",
            lambda place: None,
        ),
        "bench": (
            bench.main,
            [*training.arguments(), "--out_dir=bench", "--json=bench.json", "--plan"],
            "bench",
            tiny,
        ),
    }


def full_disks(folder, n, rng, name):
    """n sizes of the disk, and a read-only folder, for the command called name."""
    place = Path(folder) / name
    place.mkdir()
    yield from Command(place, *commands(place)[name]).trials(n, rng)
