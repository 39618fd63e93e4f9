"""Bins and their manifest as one compressed file, for machines without a network.

The file is a tar archive, compressed by xz, of meta.json, train.bin and val.bin in this order and of nothing else. What
is unpacked is written under these three names, whatever the archive says; it must be exactly as long as meta.json says,
and have its sums, before it gets a name under which training would find it.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
from corpus.disk import require_space
from corpus.progress import Progress
from engine import locks
from engine.files import make_folder, remove_temporaries, sync_folder, write_atomically

try:
    import lzma
except ImportError:  # not every Python was built with it
    lzma = None

MANIFEST = "meta.json"
MAX_MANIFEST = 2**26  # bytes; it names each file of the source
BLOCK, CHUNK = 512, 2**20  # bytes: of tar's headers and padding; read at once
PIECE = 2**25  # bytes, which are compressed by themselves, on one core
PRESET = 6  # of xz: 2 bytes of GPT-2 tokens of C become 0.42, with preset 3 0.47 in half the time


def pack(folder, path, n_workers=1):
    """Write the bins in a folder and their manifest to a file at path, whole or not at all; equal bins, equal files.

    Raises ValueError when the bins are not those of their manifest, or the file cannot be written.
    """
    _require_lzma()
    folder, manifest = Path(folder), data.read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no {MANIFEST}: prepare it first, or name the folder of the bins with --out_dir")
    content, sizes = (folder / MANIFEST).read_bytes(), _sizes(manifest)

    def write(file):
        with (
            _Compressor(file, n_workers) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive,
            Progress("packing", sum(sizes.values())) as progress,
        ):
            archive.addfile(_header(MANIFEST, len(content)), io.BytesIO(content))
            for name, size in sizes.items():
                with open(folder / name, "rb") as tokens:
                    reader = _Reader(tokens, progress.update)
                    found = os.fstat(tokens.fileno()).st_size
                    if found == size:
                        archive.addfile(_header(name, size), reader)
                if found != size or reader.digest.hexdigest() != _sum(manifest, name):
                    raise ValueError(f"{folder / name} is not as {MANIFEST} says: prepare it again")

    write_atomically(path, write)


def unpack(path, folder):
    """Write the bins and the manifest that are packed in the file at path into a folder; returns the manifest.

    Raises ValueError, with the folder as it was, for a file that is damaged or of another kind, and for a folder that
    holds other bins.
    """
    _require_lzma()
    path, folder = Path(path), Path(folder)
    with _refusing(path), open(path, "rb") as file, lzma.open(file, "rb") as stream:
        content = b"".join(_chunks(stream, _next_file(stream, MANIFEST, range(MAX_MANIFEST))))
        manifest = _read_manifest(content)
        with locks.only_writer(folder):
            if not _has_bins(folder, manifest):
                _unpack_bins(stream, manifest, content, folder)
    return manifest


def _unpack_bins(stream, manifest, content, folder):
    """Write what is left of a stream after the manifest, whose content is given, into a folder."""
    sizes = _sizes(manifest)
    require_space((folder, sum(sizes.values()), "the bins"))
    made, temporaries = make_folder(folder), {}
    remove_temporaries(folder)
    try:
        with Progress("unpacking", sum(sizes.values())) as progress:
            for name, size in sizes.items():
                _next_file(stream, name, [size])
                temporaries[name], digest = folder / f".{name}.{os.getpid()}.tmp", hashlib.sha256()
                with open(temporaries[name], "wb") as tokens:
                    for chunk in _chunks(stream, size):
                        digest.update(chunk)
                        tokens.write(chunk)
                        progress.update(len(chunk))
                    tokens.flush()
                    os.fsync(tokens.fileno())
                if digest.hexdigest() != _sum(manifest, name):
                    raise PackingError(f"its {name} has the SHA-256 {digest.hexdigest()}, not that of its {MANIFEST}")
        while rest := stream.read(CHUNK):
            if rest.strip(b"\0"):
                raise PackingError("there is more in it than bins and manifest")
        write_atomically(folder / MANIFEST, lambda file: file.write(content))  # first: bins without it are GPT-2's
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
        sync_folder(folder)
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _read_manifest(content):
    """The manifest in the bytes of a meta.json."""
    try:
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise PackingError(f"its {MANIFEST} is no JSON object")
        data.check_manifest(manifest, f"its {MANIFEST}")
    except ValueError as error:  # json's and data's
        raise PackingError(str(error)) from error
    counts = [manifest["splits"][split]["tokens"] for split in data.SPLITS]
    if not all(type(count) is int and 0 <= count < 2**60 for count in counts):
        raise PackingError(f"its {MANIFEST} must have whole numbers of tokens, got {counts}")
    return manifest


def _has_bins(folder, manifest):
    """Whether a folder has the bins of a manifest already. Raises ValueError when it has others."""
    there = data.read_manifest(folder)
    sizes = _sizes(manifest)
    is_same = there and {name: _sum(there, name) for name in sizes} == {name: _sum(manifest, name) for name in sizes}
    found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).exists()}
    if (there or found) and not is_same:
        raise ValueError(f"{folder} holds other bins: choose another --out_dir, or delete the folder")
    return found == sizes


def _sizes(manifest):
    """The name of each bin -> its size in bytes."""
    itemsize = data.DTYPES[manifest["dtype"]].itemsize
    return {f"{split}.bin": manifest["splits"][split]["tokens"] * itemsize for split in data.SPLITS}


def _sum(manifest, name):
    """The SHA-256 that a manifest has for a bin."""
    return manifest["splits"][name.removesuffix(".bin")]["sha256"]


def _header(name, size):
    """The entry of a file in the archive, the same on every machine."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry


def _next_file(stream, name, sizes):
    """The size, which must be in sizes, of the file that a tar stream must go on with, which must have this name.

    Raises PackingError for anything else: headers that describe the next one, too, which may be of any length.
    """
    entry = tarfile.TarInfo.frombuf(b"".join(_chunks(stream, BLOCK, padded=False)), "utf-8", "replace")
    if entry.name != name or not entry.isreg():
        raise PackingError(f"it must have {name} next, got {entry.name!r}")
    if entry.size not in sizes:
        raise PackingError(f"its {name} must have the size that its {MANIFEST} says, got {entry.size:,} bytes")
    return entry.size


def _chunks(stream, size, padded=True):
    """The next `size` bytes of a stream, in pieces, and past tar's padding. Raises EOFError when it ends before."""
    left = size
    while left:
        chunk = stream.read(min(left, CHUNK))
        if not chunk:
            raise EOFError("it ends too early")
        left -= len(chunk)
        yield chunk
    if padded:
        stream.read(-size % BLOCK)


class PackingError(Exception):
    """What is wrong with a file that should hold bins."""


class _Compressor:
    """Writes what it gets to a file as xz, piece by piece, in n_workers threads: streams in a row are a file, too."""

    def __init__(self, file, n_workers):
        self.file, self.buffer, self.pending = file, bytearray(), collections.deque()
        self.n_workers, self.pool = n_workers, ThreadPoolExecutor(n_workers)

    def write(self, content):
        """Add bytes."""
        self.buffer += content
        if len(self.buffer) >= PIECE:
            self._submit()

    def _submit(self):
        self.pending.append(self.pool.submit(lzma.compress, bytes(self.buffer), preset=PRESET))
        self.buffer.clear()
        if len(self.pending) > self.n_workers:
            self.file.write(self.pending.popleft().result())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self.pool:
            if kind is None:
                self._submit()
                for piece in self.pending:
                    self.file.write(piece.result())


class _Reader:
    """A file to read from, which hashes and counts what is read."""

    def __init__(self, file, report):
        self.file, self.report, self.digest = file, report, hashlib.sha256()

    def read(self, size):
        """The next bytes."""
        chunk = self.file.read(size)
        self.digest.update(chunk)
        self.report(len(chunk))
        return chunk


def _require_lzma():
    if lzma is None:
        raise ValueError("packed bins need the module lzma, which this Python was built without: use another Python")


@contextlib.contextmanager
def _refusing(path):
    """Raise ValueError, naming the file at path, for what is wrong with its content."""
    try:
        yield
    except (lzma.LZMAError, tarfile.TarError, EOFError, RecursionError, PackingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged, or not what --pack writes: {reason}") from error
