"""Which files a source has: the standard library of Python, or files on this machine. hub.py has those of the hub."""

import functools
import glob
import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from corpus import kinds

ENDS_BYTES = 2**16  # of the beginning and of the end of a file that its identity includes


@dataclass(frozen=True)
class TextFile:
    """A file of documents on this machine."""

    path: str
    name: str  # as meta.json and the state of a preparation call it
    kind: str  # those of kinds.recognise, and 'python': one document, decoded as `errors="replace"` does
    compression: str | None = None
    is_pinned: bool = False  # its name includes the hash of its content, or a commit does

    @functools.cached_property
    def identity(self):
        """What tells whether the file is the one that was read, as plain values.

        Name, size, and the SHA-256 of both ends; the time of modification, too, where the ends are not the whole file,
        unless the file is pinned: a second download has another time. Raises OSError.
        """
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256(file.read(ENDS_BYTES))
            file.seek(max(file.tell(), status.st_size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
        identity = {"name": self.name, "bytes": status.st_size, "ends_sha256": digest.hexdigest()}
        if status.st_size > 2 * ENDS_BYTES and not self.is_pinned:
            identity["mtime_ns"] = status.st_mtime_ns
        return identity

    def record(self):
        """What the state of a preparation says about the file: its identity, and always the time of modification."""
        return {"identity": self.identity, "mtime_ns": os.stat(self.path).st_mtime_ns}


def text_file(path, name, is_pinned=False):
    """The TextFile at path. Raises ValueError for a file that is not text, OSError for one that cannot be opened."""
    return TextFile(path, name, *kinds.recognise(path, name), is_pinned)


def stdlib_files():
    """The running interpreter's standard library: each .py file outside site-packages and test folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "test", "tests", "idle_test"}
    names = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    return [TextFile(str(root / name), str(name), "python") for name in names if not outside.intersection(name.parts)]


def describe_source(cfg):
    """(description, files) of the source of a PrepareConfig: what meta.json says about it, so far as that is known
    without the network, and its TextFiles; None in place of the files of a dataset on the hub.

    Raises ValueError where no file matches, or where one is not text.
    """
    if cfg.source == "stdlib":
        return {"id": "stdlib", "revision": f"Python {platform.python_version()}"}, stdlib_files()
    if cfg.source == "files":
        files = [text_file(path, path) for path in matching_files(cfg.files)]
        identities = [file.identity for file in files]
        return {"id": "files", "text_column": cfg.text_column, "files": identities}, files
    revision = {"revision": cfg.revision} if cfg.revision else {}
    return {"id": cfg.source, "subset": cfg.subset, **revision, "text_column": cfg.text_column}, None


def matching_files(patterns):
    """The paths of the files that a comma-separated list of files, folders and glob patterns names, sorted.

    What exists as it is written is no pattern, whatever characters its name has; ~ is the home folder. A folder stands
    for all files in it, at any depth, but for those whose names, or folders' names, begin with a dot. A file that is
    named more than once, be it through a link, appears once. Raises ValueError where an element of the list matches no
    file or something else than a file, OSError for a folder that cannot be read.
    """
    whole = os.path.expanduser(patterns)
    found = set()
    elements = [element.strip() for element in patterns.split(",") if element.strip()]
    for pattern in [whole] if os.path.lexists(whole) or not elements else elements:
        paths = _matches(Path(pattern).expanduser())
        if not paths:
            raise ValueError(
                f"no file matches {pattern!r} of --files: it takes files, folders and patterns (in quotes, so that the "
                "shell leaves them alone), separated by commas"
            )
        found.update(paths)
    files = {}  # real path -> path
    for path in sorted(found):
        if not os.path.isfile(path):
            raise ValueError(f"{path} of --files is neither a file nor a folder, or a link that leads nowhere")
        files.setdefault(os.path.realpath(path), path)
    return list(files.values())


def _matches(pattern):
    """The paths of the files that a Path names: a file, a folder, or a pattern, whose first part may be a folder."""
    existing = Path()  # the part that is no pattern
    for i, part in enumerate(pattern.parts):
        if not os.path.lexists(existing / part):
            rest = os.path.join(*pattern.parts[i:])
            paths = [str(existing / path) for path in glob.glob(rest, root_dir=existing, recursive=True)]
            return [path for path in paths if not os.path.isdir(path)]
        existing /= part
    return list(_walk(str(existing))) if existing.is_dir() else [str(existing)]


def _walk(folder):
    """Yield the paths of all files in a folder, at any depth, also through links, but for hidden ones."""

    def stop(error):
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))
