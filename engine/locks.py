"""One writer at a time: locks on files, which the system releases when their last holder ends, however it ends.

So there are no stale locks on one machine. Between machines a lock needs a network file system that passes flock on
(NFS from version 4 does, Lustre with the mount option flock).
"""

import contextlib
import datetime
import json
import os
import socket
from pathlib import Path

from engine.files import make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

INHERITED = "RUN_LOCK"  # the environment variable that names the descriptor of a lock which a parent process holds


def lock_path(run):
    """The lock file of a run folder, beside it."""
    return Path(f"{run}.lock")


def acquire(path, wait=False):
    """Lock the file at path: its descriptor, or None if another process holds the lock. wait: wait for that process.

    A child process that inherits the descriptor holds the lock, too; closing it releases the lock. Raises ValueError on
    a file system without locks, and for a file that cannot be opened.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot open the lock {path}: {error.strerror}; choose another --out_dir") from error
        if not _lock(descriptor, path, wait):
            os.close(descriptor)
            return None
        if _is_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder removed it while we waited: the file at path is another one now


def is_locked(path):
    """Whether some process holds the lock file at path. Who looks needs no right to write, and is not taken for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(descriptor, path, wait=False, shared=True)
    finally:
        os.close(descriptor)


def _is_file(descriptor, path):
    """Whether an open file is the one at path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _lock(descriptor, path, wait, shared=False):
    try:
        if fcntl:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        else:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise ValueError(
            f"cannot lock {path} ({error.strerror}): choose an --out_dir=… on a file system that supports flock"
        ) from error
    return True


def write_note(descriptor, **values):
    """Replace the content of a lock file by a note: which process works on the run (pid), or how it ended.

    Without space for it there is no note; the lock holds all the same.
    """
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, (json.dumps({"host": socket.gethostname(), **values}) + "\n").encode())


def read_note(path):
    """The note in a lock file, a dict; empty where there is none, or only a part of one."""
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def now():
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def only_writer(run):
    """A context in which no other process writes into a run folder; nothing but the folder's content stays of it.

    A parent process that holds the lock (studies/workers.py) passes it on. Raises ValueError, naming the other process,
    when there is one.
    """
    path = lock_path(run)
    inherited = os.environ.get(INHERITED, "")
    if inherited.isdecimal() and _is_file(int(inherited), path):
        yield
        return
    made = make_folder(path.parent)
    descriptor = acquire(path)
    if descriptor is None:
        note = read_note(path)
        who = ", ".join(f"{name} {note[name]}" for name in ("pid", "host", "started") if name in note)
        raise ValueError(f"{run} is being written by another process ({who or 'see ' + str(path)}): wait, or stop it")
    try:
        write_note(descriptor, pid=os.getpid(), started=now())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        os.close(descriptor)
        for folder in made:  # left empty by a start that was refused
            with contextlib.suppress(OSError):
                folder.rmdir()
