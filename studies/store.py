"""The folder of a study: its study.json, the locks of its runs, and the state of each run.

    out/study_lr-quick/study.json                  the arms, grid, seeds and controls
    out/study_lr-quick/reduced,learning_rate=0.003/seed1/    a run folder of train.py, and its output in log.txt
    out/study_lr-quick/reduced,learning_rate=0.003/seed1.lock

A lock is an flock on its file. The system releases it when the last process that holds it ends, for whatever reason, so
one machine has no stale locks. Several machines need a network file system that supports flock (NFS from version 4,
Lustre with the mount option flock); where that is in doubt, let them work on different runs, as a job array does.
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
STUDY = "study.json"
STATES = ("running", "failed", "diverged", "stopped", "finished", "not started")
STOPPED = (130, -2, -15)  # exit statuses of a run that Ctrl-C or SIGTERM stopped


def is_study(folder):
    """Whether a folder is that of a study."""
    return (Path(folder) / STUDY).exists()


def read_study(folder):
    """The content of a study folder's study.json. Raises ValueError where there is none."""
    content = read_json(Path(folder) / STUDY)
    if content is None:
        raise ValueError(f"{folder} is not a study folder: it has no {STUDY}, which sweep.py writes when it starts")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{folder}/{STUDY} must have format {FORMAT}, got {content.get('format')!r}: it was written by another "
            "version of sweep.py"
        )
    return content


def write_study(folder, content):
    """Write study.json; seeds that an earlier call on the same folder had stay in it, and in its command.

    Raises ValueError when the folder holds a different study: one with which it has no arm and point in common.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = acquire(Path(folder) / "study.lock", wait=True)
    try:
        earlier = read_json(Path(folder) / STUDY) or content
        if not {entry["name"] for entry in earlier["arms"]} & {entry["name"] for entry in content["arms"]}:
            raise ValueError(
                f"{folder} already contains a different study ({earlier['command']}): choose another --out_dir=…"
            )
        seeds = sorted({*earlier["seeds"], *content["seeds"]})
        command = content["command"]
        if set(seeds) != set(content["seeds"]):
            words = [word for word in shlex.split(command) if not word.startswith("--seeds=")]
            command = shlex.join([*words, f"--seeds={','.join(map(str, seeds))}"])
        write_json(Path(folder) / STUDY, {"format": FORMAT, **content, "command": command, "seeds": seeds})
    finally:
        os.close(lock)


def run_folder(folder, name, seed):
    """The folder of a run. name: of its arm and point, as in study.json."""
    return Path(folder) / name / f"seed{seed}"


def lock_path(run):
    """The lock file of a run folder, beside it."""
    return Path(f"{run}.lock")


def acquire(path, wait=False):
    """Lock the file at path: its descriptor, or None if another process holds the lock. wait: wait for that process.

    A child process that inherits the descriptor holds the lock, too; closing it releases the lock. Raises ValueError on
    a file system without locks.
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
            f"cannot lock {path} ({error.strerror}): choose an --out_dir=… on a file system that supports flock"
        ) from error
    return True


def write_note(descriptor, **values):
    """Replace the content of a lock file by a note: which process works on the run (pid), or how it ended."""
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps({"host": socket.gethostname(), **values}) + "\n").encode(), 0)


def read_note(path):
    """The note in a lock file, a dict; empty where there is none, or only a part of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def has_failed(note):
    """Whether a lock file's note says that its run exited with an error, rather than being stopped."""
    return note.get("exit_status", 0) not in (0, *STOPPED)


def state(run):
    """The state of the run in a run folder: one of STATES, from its files and its lock."""
    if run_files.is_finished(run):
        return "finished"
    if is_locked(lock_path(run)):
        return "running"
    if run_files.has_diverged(run):
        return "diverged"
    if has_failed(read_note(lock_path(run))):
        return "failed"
    return "stopped" if run_files.holds_run(run) else "not started"
