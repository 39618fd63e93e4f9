"""Reading a file that torch.save wrote: whole, bit for bit as it was written, and without running code from it.

Such a file is a zip archive of uncompressed records, in a layout that has not changed since PyTorch 1.6. torch.load
looks neither at the CRC-32 of the records nor at most of what is between them: a flipped bit becomes another weight.
"""

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from engine.files import reason

LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how files of PyTorch before 1.6 begin
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
CHUNK_BYTES = 1 << 20
MAX_16, MAX_32 = 0xFFFF, 0xFFFFFFFF  # in the zip format: the number is in a 64-bit field


def read(path, map_location="cpu", mmap=False, legacy=False):
    """The object in a file of torch.save: tensors and plain values (NumPy scalars become Python's).

    Compares each record with its CRC-32, and each byte outside the records with what torch.save writes there: 0.4 s for
    1.5 GB (in the page cache, on an AMD EPYC), beside 0.2 s of torch.load itself.
    mmap: map the tensors into memory, without reading them and without their CRC-32.
    legacy: take the format of PyTorch before 1.6, too, which has no checksums.
    Raises ValueError for a damaged file, and for one of another kind: what it is, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a checkpoint file; {_files_beside(path / 'ckpt.pt')}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe: name a checkpoint file")
    try:
        with open(path, "rb") as file:  # buffered: unbuffered, a read ends after 2 GB, and torch takes that for the end
            is_legacy = legacy and file.read(len(LEGACY)) == LEGACY
            file.seek(0)
            if not is_legacy:
                _check_kind(file, path)
                file.seek(0)
                _check_bytes(file, path, with_tensors=not mmap)
                file.seek(0)
            return _load(path if mmap else file, path, map_location=map_location, mmap=mmap)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"there is no checkpoint {path}: {_files_beside(path)}") from error
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {reason(error)}") from error


def _files_beside(path):
    """Which checkpoints are in the folder of path, as a clause."""
    folder = path.parent
    if not folder.is_dir():
        return f"{folder} is a file" if folder.is_file() else f"there is no folder {folder}"
    names = sorted(found.name for found in folder.glob("*.pt"))
    return f"the .pt files in {folder} are {', '.join(names)}" if names else f"{folder} has no .pt files"


def _check_kind(file, path):
    """Raise ValueError, saying what it is, for a file that is no zip archive."""
    head = file.read(512)
    if head.startswith(b"PK\3\4"):
        return
    text, start = _as_text(head), head.lstrip().lower()
    if not head:
        kind = "is empty: copy or download it again"
    elif head.startswith(b"version https://git-lfs"):
        kind = "is a Git LFS pointer, which stands for the file: run `git lfs pull`"
    elif start.startswith((b"<!doctype", b"<html")):
        kind = "is an HTML page, such as a failed download leaves: download the checkpoint again"
    elif head[8:10] == b'{"':
        kind = "is a safetensors file: name a checkpoint that torch.save wrote"
    elif text is not None:
        content = "JSON" if start.startswith((b"{", b"[")) else "text"
        kind = f"contains {content}: name a checkpoint that torch.save wrote"
    elif head.startswith(LEGACY):
        kind = (
            "is in the format of PyTorch before 1.6, which has no checksums: convert it with "
            f"`torch.save(torch.load('{path}', weights_only=True), …)`"
        )
    elif head[:1] == b"\x80" and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL:
        kind = "is a pickle, which could run code when it is loaded: save tensors and plain values with torch.save"
    elif head.startswith(COMPRESSED):
        kind = "is compressed: unpack it first"
    elif not any(head):
        kind = "begins with zeros, as a crash can leave a file that was not on the disk yet: use another checkpoint"
    else:
        kind = "is damaged at its beginning, or not a file that torch.save wrote: use another checkpoint"
    raise ValueError(f"{path} {kind}")


def _as_text(head):
    """The beginning of a file as text, or None where it is binary."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character that the end cuts apart is none of a binary file
            return None
        text = head[: error.start].decode()
    return text if all(c.isprintable() or c.isspace() for c in text) else None


def _check_bytes(file, path, with_tensors):
    """Raise ValueError unless a zip archive is, byte for byte, one that torch.save wrote, as far as that can be known.

    The archive's directory at its end gives the name, the size and the CRC-32 of each record; all else follows.
    with_tensors: compare the CRC-32 of the tensors, too.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except OSError:
        raise
    except Exception as error:  # BadZipFile and, for some damages, a number of others
        raise _damaged(path, "its end, where the records are listed, is cut off or unreadable") from error
    names = [record.orig_filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a TorchScript program: name a checkpoint that torch.save wrote")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is damaged, or a zip archive that torch.save did not write (it has no data.pkl)")
    if not any(record.CRC for record in records):
        raise ValueError(
            f"{path} was saved without checksums: save it again after torch.serialization.set_crc32_options(True)"
        )

    position, directory = 0, b""
    for name, record in zip(names, records, strict=True):
        file.seek(position)
        extra_length = int.from_bytes(file.read(30)[28:], "little")
        header, descriptor, entry = _around(record, position, extra_length)
        file.seek(position)
        if file.read(len(header)) != header:
            raise _damaged(path, f"the header of its record {name!r} is not what torch.save writes")
        if (with_tensors or "/data/" not in name) and _crc32(file, record.file_size) != record.CRC:
            raise _damaged(path, f"its record {name!r} does not have the CRC-32 with which it was saved")
        position += len(header) + record.file_size
        file.seek(position)
        if file.read(len(descriptor)) != descriptor:
            raise _damaged(path, f"the end of its record {name!r} is not what torch.save writes")
        position += len(descriptor)
        directory += entry
    end = directory + _end(len(records), len(directory), position)
    if file.read(len(end) + 1) != end:
        raise _damaged(path, "the list of its records is not what torch.save writes")


def _damaged(path, what):
    return ValueError(f"{path} is damaged: {what}; use another checkpoint, or copy the file again")


def _crc32(file, n):
    """The CRC-32 of the next n bytes of a file, or of those that there are."""
    crc, buffer = 0, memoryview(bytearray(min(n, CHUNK_BYTES)))
    while n and (n_read := file.readinto(buffer[: min(n, CHUNK_BYTES)])):
        crc = zlib.crc32(buffer[:n_read], crc)
        n -= n_read
    return crc


def _around(record, position, extra_length):
    """What torch.save writes before the record at position, after it, and in the archive's directory about it.

    extra_length: the length of the record's extra field, which ends with padding that aligns the record.
    """
    name, size = record.orig_filename.encode(), record.file_size
    large, far = size >= MAX_32, position >= MAX_32
    flags = 0x0808 if size else 0x0800  # UTF-8; sizes after the record
    extra = _zip64(([size, 0] if large else []) + ([position] if far else []))
    padding = max(0, extra_length - len(extra) - 4)
    header = struct.pack("<4s5H3L2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra) + 4 + padding)
    header += name + extra + struct.pack("<2sH", b"FB", padding) + b"Z" * padding

    sizes = struct.pack("<2Q" if extra else "<2L", size, size)
    descriptor = struct.pack("<4sL", b"PK\7\10", record.CRC) + sizes if size else b""

    extra = _zip64(([size, size] if large else []) + ([position] if far else []))
    size, position = min(size, MAX_32), min(position, MAX_32)
    entry = struct.pack("<4s6H3L", b"PK\1\2", 0, 0, flags, 0, 0, 0, record.CRC, size, size)
    entry += struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, 0, position) + name + extra
    return header, descriptor, entry


def _zip64(numbers):
    """The zip64 extra field with these numbers; none is needed without numbers."""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _end(n, size, position):
    """What torch.save writes after the archive's directory of n records, which has size bytes and is at position."""
    zip64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, n, n, size, position)
    zip64 += struct.pack("<4sLQL", b"PK\6\7", 0, position + size, 1)
    n, size, position = min(n, MAX_16), min(size, MAX_32), min(position, MAX_32)
    return zip64 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n, n, size, position, 0)


class NumpyDtype:
    """Stands in for numpy.dtype in a file, and does nothing but keep its name."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.byte_order = state[1]


def numpy_scalar(dtype, content):
    """The Python number that a NumPy scalar in a file is; in place of NumPy's function, which takes objects, too."""
    if not re.fullmatch(r"[biuf]\d", dtype.name):
        raise ValueError(f"a NumPy scalar of dtype {dtype.name}")
    return np.frombuffer(content, dtype.byte_order + dtype.name).item()


NUMPY_SCALARS = [  # the names of NumPy 1 and 2
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
]


def _load(file, path, **options):
    """torch.load without code; its errors, which propose to run the code, in a sentence of ours."""
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the Python object {found[1]}" if found else "something else than tensors and plain values"
        raise ValueError(
            f"{path} contains {what}, which could run code when it is loaded: save tensors and plain values alone"
        ) from error
    except Exception as error:  # the bytes are as they were written, so that the content is of another kind
        why = type(error).__name__ if "weights_only" in str(error) else reason(error)
        raise ValueError(f"cannot read the checkpoint {path}: {why}") from error
