"""Where documents come from: the files of a source, on this machine or on the Hugging Face hub, and their texts.

Texts are read in Arrow batches of about BATCH_BYTES, in the order of the files, so that memory does not depend on how
much there is; only a single document has to fit.
"""

import glob
import io
import json
import os
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import write_json

BATCH_BYTES = 2**21  # of text that one thread encodes at a time
MAX_ROWS = 2**12  # of a Parquet file in a batch: the sizes in its footer say little of texts that repeat
COMPRESSION_RATIO = 4  # of text, for an estimate of what a compressed file holds


@dataclass(frozen=True)
class TextFile:
    """A file of documents on this machine."""

    path: str
    name: str  # as meta.json and the state of a preparation call it
    kind: str  # 'parquet', 'jsonl', 'text' (one document) or 'python' (the same, read as Python's own library is)

    @property
    def compression(self):
        """'gzip', 'zstd' or None."""
        return {".gz": "gzip", ".zst": "zstd"}.get(Path(self.name).suffix)

    def record(self):
        """[name, bytes, time of change]: what tells whether the file is still the same."""
        status = os.stat(self.path)
        return [self.name, status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of one file."""

    file: int  # the index of the file in the source
    path: str
    first: int  # the index of the first document in the file
    texts: Any  # pyarrow array of strings
    check: int | None = None  # the document that is also encoded by tiktoken, an index into texts


def text_file(path, name):
    """The TextFile at path, its kind told by its name."""
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    kinds = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
    return TextFile(path, name, kinds.get(suffix, "text"))


def stdlib_files():
    """The running interpreter's standard library: each .py file outside site-packages and test folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "test", "tests", "idle_test"}
    names = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    return [TextFile(str(root / name), str(name), "python") for name in names if not outside.intersection(name.parts)]


def local_source(cfg):
    """The source as meta.json describes it, so far as that takes no network, and its files.

    The files are None for a dataset on the hub: see hub_files. Raises ValueError when no file matches.
    """
    if cfg.source == "stdlib":
        return {"id": "stdlib", "revision": f"Python {platform.python_version()}"}, stdlib_files()
    if cfg.source == "files":
        paths = sorted(path for path in glob.glob(cfg.files, recursive=True) if os.path.isfile(path))
        if not paths:
            raise ValueError(f"no file matches --files='{cfg.files}'; the quotes keep the shell from expanding it")
        sizes = [{"name": path, "bytes": os.path.getsize(path)} for path in paths]
        return {"id": "files", "text_column": cfg.text_column, "files": sizes}, [text_file(p, p) for p in paths]
    revision = {"revision": cfg.revision} if cfg.revision else {}
    return {"id": cfg.source, "subset": cfg.subset, **revision, "text_column": cfg.text_column}, None


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset on the hub, at one commit; those in `missing` are not downloaded yet."""

    repository: str
    revision: str
    paths: tuple[str, ...]
    missing: tuple[str, ...]
    missing_bytes: int


def find_on_hub(cfg, work):
    """The HubFiles of cfg's source, in the order of load_dataset's train split. Raises ValueError for all that fails.

    `datasets` says which files they are. The answer is kept in work/source.json: a branch that moves in the meantime
    changes nothing, and once all files are downloaded no network is needed.
    """
    listing = Path(work) / "source.json"
    request = {"source": cfg.source, "subset": cfg.subset, "revision": cfg.revision}
    found = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # each of its attempts would be a line; the last error says it all
    try:
        if found.get("request") != request:
            import datasets

            print(f"asking the hub for the files of {cfg.source}", flush=True)
            builder = datasets.load_dataset_builder(cfg.source, cfg.subset, revision=cfg.revision)
            found = {"request": request, "urls": [str(url) for url in builder.config.data_files["train"]]}
            Path(work).mkdir(parents=True, exist_ok=True)
            write_json(listing, found)
        matches = [re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url) for url in found["urls"]]
        repository, revision = matches[0][1], matches[0][2]
        paths = tuple(match[3] for match in matches)
        options = {"revision": revision, "repo_type": "dataset"}
        cached = [huggingface_hub.try_to_load_from_cache(repository, path, **options) for path in paths]
        missing = tuple(path for path, local in zip(paths, cached, strict=True) if not isinstance(local, str))
        infos = huggingface_hub.HfApi().get_paths_info(repository, list(missing), **options) if missing else ()
        return HubFiles(repository, revision, paths, missing, sum(info.size for info in infos))
    except Exception as error:  # of the network, of the names, of a dataset without files or without a train split
        raise ValueError(
            f"cannot find the files of {cfg.source}, subset {cfg.subset}, revision {cfg.revision} "
            f"({first_line(error)}): check the network and these names; files on this machine need --source=files"
        ) from error


def hub_cache():
    """The folder where the hub's client keeps what it downloads."""
    import huggingface_hub

    return huggingface_hub.constants.HF_HUB_CACHE


def download(hub):
    """The TextFiles of HubFiles, downloaded into the cache of the hub's client, which keeps each file that is complete.

    load_dataset would copy all text into a second cache, 40 GB for OpenWebText, and streaming would download
    everything again after an interruption. Raises ValueError when the download breaks off.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            hub.repository,
            revision=hub.revision,
            repo_type="dataset",
            allow_patterns=[glob.escape(path) for path in hub.paths],
            local_files_only=not hub.missing,
        )
    except Exception as error:  # of the network, in many forms
        raise ValueError(
            f"the download of {hub.repository} broke off ({first_line(error)}): the files that are complete are kept; "
            "repeat the command to go on"
        ) from error
    return [text_file(os.path.join(folder, path), path) for path in hub.paths]


def read_parquet(file, column, skip):
    """Yield the texts of a Parquet file after the first `skip`, in arrays of about BATCH_BYTES."""
    import pyarrow.parquet as pq

    # Without pre-buffering, a column is read page by page: a file may be one row group of any size.
    parquet = pq.ParquetFile(file.path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    groups = list(range(parquet.num_row_groups))
    while groups and (rows := parquet.metadata.row_group(groups[0]).num_rows) <= skip:
        skip -= rows
        groups.pop(0)
    rows = BATCH_BYTES * parquet.metadata.num_rows // max(1, text_bytes(file, column))
    for batch in parquet.iter_batches(min(max(1, rows), MAX_ROWS), row_groups=groups, columns=[column]):
        texts = batch.column(0)[skip:]
        skip = max(0, skip - batch.num_rows)
        yield texts


def read_jsonl(file, column, skip):
    """Yield the texts of a file of JSON lines after the first `skip`, in arrays of about BATCH_BYTES."""
    texts, size, done = [], 0, 0
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            done += 1
            if done <= skip:
                continue
            try:
                text = json.loads(line)[column]
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{file.path}, line {number:,} has no field {column!r}: see --text_column") from error
            except ValueError as error:
                raise ValueError(f"{file.path}, line {number:,} is not JSON ({error}): mend or remove it") from error
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{file.path}, line {number:,}: {column} is {kind}, not text: see --text_column")
            texts.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield string_array(texts)
                texts, size = [], 0
    if texts:
        yield string_array(texts)


def read_text(file, column, skip):
    """Yield the one text of a plain file, unless it is skipped."""
    if skip:
        return
    if file.kind == "python":
        yield string_array([Path(file.path).read_text(encoding="utf-8", errors="replace")])
        return
    with _open(file) as stream:
        content = stream.read()
    try:
        yield string_array([content.decode("utf-8")])
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is not UTF-8 text (byte {error.start:,}), and its name is not that of Parquet or JSON Lines"
        ) from error


def _open(file):
    import pyarrow as pa

    stream = pa.CompressedInputStream(file.path, file.compression) if file.compression else pa.OSFile(file.path)
    return io.BufferedReader(stream, 2**20)


def batches(files, column, first_file=0, skip=0):
    """Yield the documents of files from first_file on, without its first `skip`, as Batch.

    Raises ValueError for a file that cannot be read.
    """
    import pyarrow as pa

    readers = {"parquet": read_parquet, "jsonl": read_jsonl, "text": read_text, "python": read_text}
    for index, file in enumerate(files[first_file:], first_file):
        done = skip
        try:
            for texts in readers[file.kind](file, column, skip):
                if len(texts):
                    yield Batch(index, file.path, done, texts)
                    done += len(texts)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
        skip = 0


def valid_texts(batch):
    """The texts of a Batch as a pyarrow array of large strings. Raises ValueError for a row that is not text."""
    import pyarrow as pa

    texts = batch.texts
    if texts.null_count:
        row = batch.first + texts.is_null().to_pylist().index(True)
        raise ValueError(f"{batch.path}, row {row:,} (from 0) is null, not text: remove the row, or put a text there")
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        texts = texts.cast(pa.large_string())
    # The same as a cast, which would import all of pyarrow.compute; and without the marks of rows that are null.
    _, offsets, content = texts.buffers()
    offsets = np.frombuffer(offsets, np.int32 if pa.types.is_string(texts.type) else np.int64)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    texts = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), content or pa.py_buffer(b""))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        rows = f"rows {batch.first:,} to {batch.first + len(texts) - 1:,}"
        raise ValueError(
            f"{batch.path}, one of {rows} is not UTF-8 text ({error}): mend or replace the file, then repeat the "
            "command to go on"
        ) from error
    return texts


def string_array(texts):
    """A list of strings as a pyarrow array; half a surrogate pair, which JSON can spell, is U+FFFD, as tiktoken has it.

    pa.array would import pandas, which takes as long as everything else that a small preparation does.
    """
    import pyarrow as pa

    encoded = [_utf8(text) for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def text_bytes(file, column):
    """The bytes of text in a file, about. Raises ValueError for a file without the column, or that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.kind != "parquet":
        return os.path.getsize(file.path) * (COMPRESSION_RATIO if file.compression else 1)
    try:
        metadata, schema = pq.read_metadata(file.path), pq.read_schema(file.path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error
    if column not in schema.names:
        raise ValueError(f"{file.path} has no column {column!r}, only {', '.join(schema.names)}: see --text_column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{file.path}: the column {column} is of type {kind}, not text: see --text_column")
    place = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(group).column(place).total_uncompressed_size for group in groups)


def _unreadable(file, error):
    return ValueError(
        f"{file.path} cannot be read ({first_line(error)}): it is damaged or cut short. What was done is kept: replace "
        "the file (one from the hub: delete it), then repeat the command to go on"
    )


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
