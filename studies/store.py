"""The folder of a study: its study.json, the locks of its runs, and how they stand.

    out/study_lr-quick/study.json                  the arms, grid, seeds and controls
    out/study_lr-quick/reduced,learning_rate=0.003/seed1/    a run folder of train.py, and its output in log.txt
    out/study_lr-quick/reduced,learning_rate=0.003/seed1.lock

A lock is an flock on its file, which the system lets go when the last process that holds it ends, however it ends. So
there are no stale locks on one machine. Between machines it needs a network file system that passes flock on (NFS from
version 4 does, Lustre with the mount option flock): where that is in doubt, give each machine a share of its own.
"""

import fcntl
import json
import os
import shlex
import socket
from pathlib import Path

from engine import run_files
from engine.files import read_json, write_json

FORMAT = 1
STATES = ("running", "failed", "diverged", "stopped", "finished", "not started")
STOPPED = (130, -2, -15)  # exit statuses of a run that Ctrl-C or SIGTERM ended


def read_study(folder):
    """The content of a study folder's study.json. Raises ValueError where there is none."""
    content = read_json(Path(folder) / "study.json")
    if content is None:
        raise ValueError(f"{folder} is not a study: it has no study.json, which sweep.py writes when it starts a study")
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder}/study.json is not of format {FORMAT}: it was written by another version")
    return content


def write_study(folder, content):
    """Write study.json, with the seeds of an earlier call on the same folder among its own, and in its command.

    Raises ValueError when the folder is that of another study: one that has no arm, at no point, in common.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = acquire(Path(folder) / "study.lock", wait=True)
    try:
        earlier = read_json(Path(folder) / "study.json") or content
        if not {entry["name"] for entry in earlier["arms"]} & {entry["name"] for entry in content["arms"]}:
            raise ValueError(f"{folder} holds another study ({earlier['command']}): give this one its own --out_dir=…")
        seeds = sorted({*earlier["seeds"], *content["seeds"]})
        command = content["command"]
        if set(seeds) != set(content["seeds"]):
            words = [word for word in shlex.split(command) if not word.startswith("--seeds=")]
            command = shlex.join([*words, f"--seeds={','.join(map(str, seeds))}"])
        write_json(Path(folder) / "study.json", {"format": FORMAT, **content, "command": command, "seeds": seeds})
    finally:
        os.close(lock)


def run_folder(folder, name, seed):
    """Where the run of the arm called name with this seed is."""
    return Path(folder) / name / f"seed{seed}"


def lock_path(run):
    """The lock file of a run folder, beside it."""
    return Path(f"{run}.lock")


def acquire(path, wait=False):
    """The descriptor of the lock file at path, now locked by this process; None while another process has it.

    A child that inherits the descriptor holds the lock, too; closing it lets go. Raises ValueError on a file system
    without locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _lock(descriptor, path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
        return descriptor
    os.close(descriptor)
    return None


def is_locked(path):
    """Whether some process holds the lock file at path."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, path, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor, path, operation):
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"cannot lock {path} ({error.strerror}): put the study on a file system with flock, with --out_dir=…"
        ) from error
    return True


def write_note(descriptor, **values):
    """Say in a locked file who works on its run (pid), or how that ended (exit_status)."""
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps({"host": socket.gethostname(), **values}) + "\n").encode(), 0)


def read_note(path):
    """What write_note left in a lock file; an empty dict where there is none, or only a part of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def has_failed(note):
    """Whether a lock file's note says that its run ended by itself before its end."""
    return note.get("exit_status", 0) not in (0, *STOPPED)


def state(run):
    """How the run in a run folder stands: one of STATES, from its files and its lock."""
    if run_files.is_finished(run):
        return "finished"
    if is_locked(lock_path(run)):
        return "running"
    if run_files.has_diverged(run):
        return "diverged"
    if has_failed(read_note(lock_path(run))):
        return "failed"
    return "stopped" if run_files.holds_run(run) else "not started"
