"""One run folder, one writer."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ROOT
from engine import locks

HOLDER = """
import sys
from engine import locks
with locks.only_writer(sys.argv[1]):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes into the run folder out/a."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "out/a"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    refusal = rf"out/a is being written by another process \(pid {holder.pid}, host .*20"
    with pytest.raises(ValueError, match=refusal), locks.only_writer(tmp_path / "out/a"):
        pass
    holder.communicate(b"\n")
    with locks.only_writer(tmp_path / "out/a"):
        assert locks.is_locked(locks.lock_path(tmp_path / "out/a"))
    assert not (tmp_path / "out/a.lock").exists()


def test_a_crash_releases_the_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locks.only_writer(tmp_path / "out/a"):
        pass


def test_who_looks_at_a_lock_does_not_hold_it(tmp_path):
    path = tmp_path / "run.lock"
    os.close(locks.acquire(path))
    with open(path) as file:  # as another watcher does
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not locks.is_locked(path)
    lock = locks.acquire(path)
    assert locks.is_locked(path)
    os.close(lock)


def test_a_child_keeps_the_lock_that_its_parent_passes_on(tmp_path, monkeypatch):
    path = locks.lock_path(tmp_path / "run")
    lock = locks.acquire(path)
    monkeypatch.setenv(locks.INHERITED, str(lock))
    with locks.only_writer(tmp_path / "run"):
        assert path.exists()
    assert path.exists() and locks.is_locked(path), "it is the parent's to release"
    with locks.only_writer(tmp_path / "other"):  # the parent's lock is not that of another run
        assert locks.is_locked(tmp_path / "other.lock")
    os.close(lock)


def test_a_refused_start_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), locks.only_writer(tmp_path / "new/folders/run"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    Path(tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make the folder"), locks.only_writer(tmp_path / "file/run"):
        pass


def test_a_lock_holds_without_space_for_its_note(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", no_space)
    with locks.only_writer(tmp_path / "run"):
        assert locks.is_locked(tmp_path / "run.lock") and locks.read_note(tmp_path / "run.lock") == {}
