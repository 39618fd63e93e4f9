"""Trials: a command runs in a forked child, in a folder of its own, and something happens to it."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  which figures import, a second or more
import torch
import torch._dynamo  # which the first optimizer imports, seconds long

import configurator
from engine import runlog

SECONDS = 120  # after which a trial counts as hanging


@dataclass
class Outcome:
    """How a child ended."""

    status: int  # the exit status, or minus the number of the signal that ended it
    out: str
    err: str
    moments: int  # of file events, see FileEvents; 0 for a child that was killed
    marks: tuple = ()  # the bytes that it had written at these moments

    @property
    def is_refusal(self):
        """Whether it ended as a user's mistake must: exit status 2, and one line on standard error."""
        return self.status == 2 and self.err.startswith("error: ") and self.err.count("\n") == 1

    def describe(self):
        """The end of what it printed, in one line."""
        return f"status {self.status}: {(self.err or self.out).strip()[-300:]!r}"


def start(work, folder, prepare=None, name="child", seconds=SECONDS):
    """Fork a child that calls work() in folder; its process id. Its output goes to files beside folder, called name.

    seconds: after which it is ended; 0: it may take as long as it likes.
    prepare: called first, in the child: returns the FileEvents that are installed, if any. Its number of moments is
    in the file name.moments in the end.
    """
    folder = Path(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.chdir(folder)
        for descriptor, ending in ((1, "out"), (2, "err")):
            target = os.open(f"{folder}.{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, descriptor)
            os.close(target)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        runlog.git_commit = lambda: None  # a process, each time
        torch.set_num_threads(1)
        events = prepare() if prepare else None
        if events:
            events.install()
        try:
            work()
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if events:
            events.moment()
            events.root = "/nowhere"  # the trial is over
            Path(f"{folder}.{name}.moments").write_text(json.dumps([events.count, events.marks]))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def outcome(pid, folder, name="child"):
    """Wait for a child; its Outcome."""
    _, ended = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(ended)
    out, err, moments = (Path(f"{folder}.{name}.{ending}") for ending in ("out", "err", "moments"))
    counts = json.loads(moments.read_text()) if moments.exists() else (0, ())
    moments.unlink(missing_ok=True)
    return Outcome(status, out.read_text(errors="replace"), err.read_text(errors="replace"), *counts)


def run(main, argv, folder, prepare=None, name="child"):
    """Run a command's main(argv) in folder, as a shell would; its Outcome."""
    argv = list(map(str, argv))
    return outcome(start(lambda: configurator.run(main, argv), folder, prepare, name), folder, name)


def die():
    """End this process at once, as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def trial_folder():
    """A folder for the trials of a kind, in memory where there is a place for that; removed in the end."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=place) as folder:
        yield Path(folder)


def fresh(folder, origin):
    """The folder, made anew as a copy of origin."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder, symlinks=True)
    return Path(folder)
