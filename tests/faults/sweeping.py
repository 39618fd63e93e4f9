"""Kills during a study: of the sweep, whose runs go on without it, and of its runs."""

import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

from conftest import TINY, write_dataset

import configurator
import sweep
import train
from studies import workers

from . import children, training
from .events import REAL, REAL_OPEN, FileEvents

STUDY = """
arms = {"baseline": "", "reduced": "--wq_identity --attn_scale=0.5"}
control = "baseline"
seeds = (1, 2)
"""
ARGUMENTS = ["study.py", "tiny.py", "--out_dir=study", "--jobs=2"]
SIZE = {**TINY, "max_iters": 10, "eval_interval": 5, "warmup_iters": 2}


class ForkedRun:
    """Stands in for subprocess.Popen: the command's run in a fork of the sweep, which has imported everything already.

    It has only the descriptors that the command would have. ledger: the folder in which it notes its beginning and its
    end, and holds a lock as long as it lives. kill: (number of the run, from 1; the moment at which it is killed).
    """

    ledger, kill, started = None, (0, 0), 0

    def __init__(self, command, stdin, stdout, stderr, env, pass_fds, process_group):
        ForkedRun.started += 1
        self.args, self.returncode = command, None
        stops = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # until it has handlers of its own
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
            return
        status = 1
        try:
            os.setpgid(0, process_group)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
            log = os.readlink(f"/proc/self/fd/{stdout.fileno()}")
            for descriptor in (1, 2):
                os.dup2(stdout.fileno(), descriptor)
            os.closerange(3, pass_fds[0])
            os.closerange(pass_fds[0] + 1, 1024)
            EVENTS[0].files.clear()
            os.environ.clear()
            os.environ.update(env)
            sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (with its events)
            if self.kill[0] == ForkedRun.started:
                EVENTS[0].count, EVENTS[0].at, EVENTS[0].action = 0, self.kill[1], children.die
            else:
                EVENTS[0].at = None
            status = self.train(command[2:])
        finally:
            os._exit(status)

    def train(self, argv):
        """Run train.py; its exit status."""
        name = next(argument for argument in argv if argument.startswith("--out_dir=")).partition("=")[2]
        guard = REAL["open"](self.ledger / name.replace("/", "-"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.note(f"two {name}")
        self.note(f"start {name}")
        try:
            configurator.run(train.main, argv)
        except SystemExit as stopped:
            self.note(f"end {name} {stopped.code or 0}")
            return stopped.code or 0

    def note(self, line):
        """Add a line to the ledger."""
        with REAL_OPEN(self.ledger / "ledger.txt", "a") as file:
            file.write(line + "\n")

    def poll(self):
        """The exit status, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self):
        """Send SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


EVENTS = []  # the FileEvents of the sweep


class Study:
    """A study of four runs, uninterrupted, and trials in which it is interrupted and repeated."""

    def __init__(self, folder):
        self.origin, self.trial, self.ledger = (Path(folder) / name for name in ("origin", "trial", "ledger"))
        write_dataset(self.origin / "data/tiny", n_train=1000, n_val=200)
        (self.origin / "study.py").write_text(STUDY)
        (self.origin / "tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in SIZE.items()))
        self.begin()
        done = self.run(lambda: FileEvents(self.trial))
        assert done.status == 0, done.describe()
        self.moments, self.seen = done.moments, (self.ledger / "ledger.txt").read_text().splitlines()
        self.expected = {run: training.result(run) for run in self.folders()}

    def folders(self):
        """The run folders."""
        return sorted((self.trial / "study").glob("*/seed*[0-9]"))

    def begin(self):
        """Make the trial's folder anew."""
        children.fresh(self.trial, self.origin)
        shutil.rmtree(self.ledger, ignore_errors=True)
        self.ledger.mkdir()

    def run(self, prepare, kill=(0, 0)):
        """Run the sweep in the trial's folder, wait for the runs that go on without it; its Outcome."""

        def begin():
            ForkedRun.ledger, ForkedRun.kill = self.ledger, kill
            workers.POLL_SECONDS = 0.01
            workers.subprocess.Popen = ForkedRun
            EVENTS.append(prepare())
            return EVENTS[0]

        return children.run(sweep.main, ARGUMENTS, self.trial, begin)

    def wait(self):
        """Wait for all runs to end."""
        for guard in self.ledger.glob("study-*"):
            with open(guard) as file:
                fcntl.flock(file, fcntl.LOCK_EX)

    def repeat(self):
        """Run the sweep to its end: '' where each run is as it must be and was done once, else what is wrong."""
        done = self.run(lambda: FileEvents(self.trial))
        self.wait()
        if done.status:
            return f"the repeated sweep failed ({done.describe()})"
        wrong, finished = [], set()
        for line in (self.ledger / "ledger.txt").read_text().splitlines():
            word, name, *status = line.split()
            if word == "two":
                wrong.append(f"two processes at once in {name}")
            elif word == "start" and name in finished:
                wrong.append(f"{name} was done twice")
            elif word == "end" and status == ["0"]:
                finished.add(name)
        for folder, expected in self.expected.items():
            names = training.differences(folder, expected) if folder.exists() else ["everything"]
            wrong += [f"other content in {folder.parent.name}/{folder.name}: {', '.join(names)}"] if names else []
        return "; ".join(wrong)


def kills(folder, n, rng):
    """Kill the sweep and one of its runs in turns, at random moments."""
    study = Study(folder)
    single = training.Training(Path(folder) / "single", **SIZE)
    for i in range(n):
        study.begin()
        if i % 2:
            run, at = rng.randint(1, 4), rng.randint(1, single.moments)
            ended = study.run(lambda: FileEvents(study.trial), kill=(run, at))
            what, right = f"run {run} at moment {at} of about {single.moments}", (0, 1)
        else:
            at = rng.randint(1, study.moments)
            ended = study.run(lambda: FileEvents(study.trial, at, children.die))  # noqa: B023
            what, right = f"the sweep at moment {at} of {study.moments}", (-signal.SIGKILL,)
        wrong = study.repeat()
        if ended.status not in right:
            wrong = wrong or f"ended otherwise ({ended.describe()})"
        yield what, wrong, None
