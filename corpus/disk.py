"""Space on the disks, and what the operating system says when something there fails."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

NO_SPACE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}  # EDQUOT is not on Windows


def require_space(*needs):
    """Print how much space is needed and free. needs: (folder, bytes, what for). Raises ValueError for too little."""
    by_disk = {}
    for folder, n_bytes, purpose in needs:
        folder = Path(folder).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        by_disk.setdefault(os.stat(existing).st_dev, []).append((existing, n_bytes, purpose))
    for group in by_disk.values():
        existing, free = group[0][0], shutil.disk_usage(group[0][0]).free
        needed = " and ".join(f"{_size(n_bytes)} for {purpose}" for _, n_bytes, purpose in group)
        if sum(n_bytes for _, n_bytes, _ in group) > free:
            raise ValueError(
                f"too little space in {existing}: needs about {needed}, {_size(free)} free; delete something, or "
                "choose another --out_dir"
            )
        print(f"needs about {needed}; {_size(free)} free in {existing}", flush=True)


def _size(n_bytes):
    unit, factor = ("GB", 1e9) if n_bytes >= 1e8 else ("MB", 1e6) if n_bytes >= 1e5 else ("kB", 1e3)
    return f"{n_bytes / factor:,.2f} {unit}"


@contextlib.contextmanager
def errors(folder):
    """Raise ValueError, with the path and the system's reason, in place of OSError; folder: for one without a path."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed: no error of the disk
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise ValueError(
                f"no space left for {error.filename or folder} ({error.strerror}): what was done is kept; free some "
                "space, then repeat the command to resume"
            ) from error
        raise ValueError(f"{error.filename or folder}: {error.strerror or error}") from error
