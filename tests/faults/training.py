"""Kills, signals, power cuts and second writers during a training run."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import torch
from conftest import TINY, write_dataset

import configurator
import train
from engine import run_files
from engine.files import read_json

from . import children
from .disk import Disk
from .events import FileEvents

RUN = {**TINY, "out_dir": "run", "save_steps": (15, 30), "batch_size": 4, "dropout": 0.1}  # two micro-batches a step
NOT_COMPARED = {"train_seconds", "wall_seconds", "tokens_per_second", "peak_memory_gib", "out_dir", "resume"}
NOT_COMPARED |= {"links"}  # which other names a checkpoint had: those are compared themselves


def arguments(**changes):
    """The command line of the tiny run, in the folder run."""
    options = {**RUN, **changes}
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in options.items()}
    return [f"--{name}={value}" for name, value in texts.items()]


def content(value):
    """A checkpoint, record or configuration without what may differ: times, and how it came about."""
    if isinstance(value, dict):
        return {name: content(item) for name, item in value.items() if name not in NOT_COMPARED}
    return [content(item) for item in value] if isinstance(value, (list, tuple)) else value


def are_equal(a, b):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_equal(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return a == b and type(a) is type(b)


def result(folder):
    """file name -> content, of all files of a finished run folder but run.json, which tells its history."""
    folder, found = Path(folder), {"log.txt": None}
    for path in folder.iterdir():
        if path.suffix == ".pt":
            found[path.name] = content(torch.load(path, weights_only=True))
        elif path.name == run_files.METRICS:
            found[path.name] = [content(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in (run_files.CONFIG, run_files.SUMMARY):
            found[path.name] = content(read_json(path))
        else:
            found[path.name] = None
    return found


def differences(folder, expected):
    """The names of the files in which a run folder is not as expected, a dict of `result`."""
    found = result(folder)
    return sorted(name for name in {*found, *expected} if not are_equal(found.get(name, 0), expected.get(name, 0)))


class Training:
    """The tiny run, uninterrupted, and trials in which it is interrupted and resumed.

    folder: where they work. changes: options of the run.
    """

    def __init__(self, folder, **changes):
        self.origin, self.trial = Path(folder) / "origin", Path(folder) / "trial"
        self.argv = arguments(**changes)
        write_dataset(self.origin / "data/tiny")
        whole = children.fresh(self.trial, self.origin)
        began = time.monotonic()
        done = children.run(train.main, self.argv, whole, lambda: FileEvents(whole))
        self.seconds = time.monotonic() - began
        assert done.status == 0, done.describe()
        self.moments, self.expected = done.moments, result(whole / "run")

    def command(self, *more):
        """What a child does to carry out the run."""
        return lambda: configurator.run(train.main, [*self.argv, *more])

    def interrupt(self, action, at, resuming=False, disk=None):
        """Run until moment number `at`, when action(disk) is called; the Outcome."""

        def prepare():
            own = disk and disk()
            return FileEvents(self.trial, at, lambda: action(own) if disk else action(), own)

        return children.run(train.main, [*self.argv, *["--resume"] * resuming], self.trial, prepare)

    def resume(self):
        """Continue the run: '' where it ends as if it had not been interrupted, else what is wrong."""
        done = children.run(train.main, [*self.argv, "--resume"], self.trial)
        if done.status:
            return f"the resumed run failed ({done.describe()})"
        wrong = differences(self.trial / "run", self.expected)
        left = [path.name for path in self.trial.iterdir() if path.name not in ("run", "data")]
        return f"other content in {', '.join([*wrong, *left])}" if wrong or left else ""

    def reached(self):
        """The last step that a run which is not finished has in its metrics; 0 for one that is."""
        run = self.trial / "run"
        return 0 if run_files.is_finished(run) else run_files.last_step(run)

    def steps_lost(self, reached):
        """The steps that the last resumed run did again, of those that had been reached."""
        return max(0, reached - read_json(self.trial / "run/run.json")["segments"][-1]["step"])


def kills(folder, n, rng):
    """Kill the run at n moments, spread over all that it has; every fourth trial kills the resumed run, too."""
    training = Training(folder)
    for i in range(n):
        children.fresh(training.trial, training.origin)
        at = 1 + (i * training.moments + rng.randrange(training.moments)) // n
        ended = training.interrupt(children.die, at)
        if i % 4 == 3:
            training.interrupt(children.die, rng.randint(1, training.moments), resuming=True)
        reached = training.reached()
        wrong = training.resume() if ended.status == -signal.SIGKILL else f"not killed ({ended.describe()})"
        yield f"moment {at} of {training.moments}", wrong, None if wrong else training.steps_lost(reached)


def power_cuts(folder, n, rng):
    """Cut the power at n moments: every second time with nothing left that was not flushed."""
    training = Training(folder)
    after = Path(f"{training.trial}.after")
    for i in range(n):
        children.fresh(training.trial, training.origin)
        at, seed = rng.randint(1, training.moments), rng.random()

        def cut(disk, seed=seed, some=i % 2):
            disk.cut(str(after), random.Random(seed) if some else None)
            children.die()

        ended = training.interrupt(cut, at, disk=lambda: Disk(training.trial))
        reached = training.reached()
        if ended.status != -signal.SIGKILL:
            yield f"moment {at}", f"no power cut ({ended.describe()})", None
            continue
        children.fresh(training.trial, after)
        shutil.rmtree(after)
        wrong = training.resume()
        yield f"moment {at} of {training.moments}", wrong, None if wrong else training.steps_lost(reached)


def signals(folder, n, rng):
    """Send SIGINT or SIGTERM, at a moment or at any time: twice, or once, when it saves its work and exits with 130."""
    training = Training(folder)
    for i in range(n):
        children.fresh(training.trial, training.origin)
        number, times, by_time = (signal.SIGINT, signal.SIGTERM)[i % 2], 1 + i // 2 % 2, i % 3 == 2
        at, delay = rng.randint(1, training.moments - 1), rng.random() * training.seconds

        def send(pid, number=number, times=times):
            for _ in range(times):
                os.kill(pid, number)
                time.sleep(0.002)  # the interpreter calls the handler between two instructions

        if by_time:
            reader, writer = os.pipe()
            run = training.command()
            pid = children.start(lambda: (os.write(writer, b"."), run()), training.trial)  # noqa: B023
            os.read(reader, 1)
            time.sleep(0.001 + delay)
            send(pid)
            os.close(reader)
            os.close(writer)
            ended = children.outcome(pid, training.trial)
        else:
            ended = training.interrupt(lambda: send(os.getpid()), at)
        reached, finished = training.reached(), run_files.is_finished(training.trial / "run")
        when = f"after {delay:.3f} s" if by_time else f"at moment {at} of {training.moments}"
        noticed = "once more to stop at once" in ended.err
        right = {130} if noticed and times == 1 else {130, -number}
        if finished:
            right = {0, *right}  # it came after the last step
        wrong = training.resume() if ended.status in right else f"not stopped ({ended.describe()})"
        lost = None if wrong else training.steps_lost(reached)
        if lost and times == 1 and noticed:
            wrong = f"{lost} steps lost, although it was asked to stop"
        yield f"{number.name} × {times} {when}", wrong, lost


def double_starts(folder, n, rng, resuming=False):
    """Start (or resume) a run twice at random delays: one process writes it, the other is refused or finds it done."""
    training = Training(folder, max_iters=80, lr_decay_iters=40)
    work = training.command(*["--resume"] * resuming)
    for _ in range(n):
        children.fresh(training.trial, training.origin)
        if resuming:
            training.interrupt(children.die, rng.randint(training.moments // 4, training.moments // 2))
        before = segments(training.trial)
        delay = rng.choice((0, rng.random() * 0.02, rng.random() * 0.5))
        first = children.start(work, training.trial, name="first")
        time.sleep(delay)
        second = children.start(work, training.trial, name="second")
        ends = [children.outcome(pid, training.trial, name) for pid, name in ((first, "first"), (second, "second"))]
        wrong = [] if any(end.status == 0 for end in ends) else ["none ran"]
        refusals = ("is being written by another process", "already contains a run")
        for end in ends:
            if end.status and not (end.is_refusal and any(words in end.err for words in refusals)):
                wrong.append(end.describe())
        written = segments(training.trial) - before
        wrong += [f"{written} processes wrote"] if written != 1 else []
        wrong += differences(training.trial / "run", training.expected)
        yield f"delay {delay:.3f} s", "; ".join(wrong), 0


def segments(folder):
    """How many processes have worked on the run in a trial's folder."""
    return len((read_json(folder / "run/run.json") or {"segments": []})["segments"])
