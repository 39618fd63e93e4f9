"""Files that are written whole or not at all, whatever happens in the middle, and read with a word about what is wrong.

Everything that replaces a file goes through `write_atomically`: a temporary file beside it, flushed to disk, renamed
over it, and the folder flushed, so that neither a kill nor a power cut leaves half of one.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path


def write_atomically(path, write):
    """Replace the file at path by what write(file) writes into an open binary file.

    Raises ValueError, with the system's reason and the file as it was before, when that is not possible.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # the rename would replace /dev/null by a file
        raise ValueError(f"cannot write {path}: there is something that is not a file; choose another name")
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        first = error
        while isinstance(first, RuntimeError) and first.__context__:
            first = first.__context__  # after a failed write torch.save raises another error, which hides the reason
        if isinstance(first, (OSError, RuntimeError)):
            raise ValueError(f"cannot write {path}: {reason(first)}; the file before, if any, is intact") from first
        raise first from None  # Ctrl-C, not what torch.save made of it


def write_text(path, text):
    """Write text to a file in UTF-8, whole or not at all. Raises ValueError (`write_atomically`)."""
    content = text.encode(errors="backslashreplace")  # the name of a folder may hold bytes that are not UTF-8
    write_atomically(path, lambda file: file.write(content))


def write_json(path, content):
    """Write content to a JSON file, whole or not at all. Raises ValueError (`write_atomically`)."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def link(path, name):
    """Make `name`, beside path, the file that path is now: a hard link, or a copy where links are not known.

    Raises ValueError, with what had the name before intact, when that is not possible.
    """
    path = Path(path)
    target = path.with_name(name)
    temporary = _temporary(target)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # where target was path's link before, POSIX has the rename do nothing
        sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {target}: {reason(error)}; the file before, if any, is intact") from error


def make_folder(path):
    """Make a folder and those above it where they are missing, and flush their names to disk; the paths of these.

    Raises ValueError, with the system's reason, when that is not possible.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {reason(error)}; choose another --out_dir") from error
    return missing


def sync_folder(folder):
    """Flush a folder, so that a rename in it survives a power cut; where folders cannot be opened (Windows) nothing."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder):
    """Remove what writers that were killed left in a folder, in which no other process writes now."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(path):
    """Where the content of path is written before it is renamed; no other process writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def read_json(path, kind=dict):
    """The content of a JSON file, or None where there is no such file.

    Raises ValueError for one that cannot be read, is not JSON, or whose content is not of the type `kind`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({reason(error)}): it is damaged, or another program's") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold {TYPES[kind]}, got {type(content).__name__}: it is another program's")
    return content


TYPES = {dict: "a JSON object", list: "a JSON array"}


def reason(error):
    """What an error says, in one line: the system's reason, or the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
