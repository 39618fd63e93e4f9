"""The texts of files, in Arrow batches of about BATCH_BYTES and in the order of the files.

Memory does not depend on the size of a file; only a single document has to fit, several times. A plain text file is a
single document.
"""

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corpus import kinds

BATCH_BYTES = 2**21  # of text that one thread encodes at a time
MAX_ROWS = 2**12  # of a Parquet file in a batch: the sizes in its footer say little about texts that repeat
JSON_BYTES = 2**20  # of a JSON array that are parsed at a time
SEPARATORS = re.compile(r"[\s,]*")  # between the elements of a JSON array
COMPRESSION_RATIO = 4  # of text, to estimate how much a compressed file holds


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of one file."""

    file: int  # the index of the file in the source
    path: str
    first: int  # the index of the first document in the file
    texts: Any  # pyarrow array of strings
    check: int | None = None  # the document that tiktoken encodes too, an index into texts


def batches(files, column, first_file=0, skip=0):
    """Yield the documents of TextFiles as Batch, from files[first_file] on and without its first `skip` documents.

    column: the field or column that holds the text; in `outer.inner`, a field of the object or struct `outer`.
    Raises ValueError for a file that cannot be read.
    """
    readers = {"parquet": read_parquet, "jsonl": read_json, "json": read_json, "text": read_text, "python": read_text}
    for index, file in enumerate(files[first_file:], first_file):
        done = skip
        with kinds.read_errors(file.path):
            for texts in readers[file.kind](file, column, skip):
                if len(texts):
                    yield Batch(index, file.path, done, texts)
                    done += len(texts)
        skip = 0


def read_parquet(file, column, skip):
    """Yield the texts of a Parquet file after the first `skip`, in arrays of about BATCH_BYTES."""
    import pyarrow as pa
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
        while pa.types.is_struct(texts.type):  # it has only the field that was asked for
            (texts,) = texts.flatten()
        skip = max(0, skip - batch.num_rows)
        yield texts


def read_json(file, column, skip):
    """Yield the texts of JSON objects after the first `skip`, in arrays of about BATCH_BYTES."""
    texts, size = [], 0
    for place, record in (json_lines if file.kind == "jsonl" else json_array)(file, skip):
        try:
            text = _look_up(record, column)
        except KeyError as error:
            fields = f", only {', '.join(_fields(record))}" if isinstance(record, dict) else ""
            raise ValueError(f"{file.path}, {place} has no field {column!r}{fields}: set --text_column") from error
        if not isinstance(text, str):
            kind = "null" if text is None else f"of type {type(text).__name__}"
            raise ValueError(f"{file.path}, {place}: the field {column!r} is {kind}, not text: set --text_column")
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield string_array(texts)
            texts, size = [], 0
    if texts:
        yield string_array(texts)


def json_lines(file, skip):
    """Yield (place, object) for each line of a file of JSON Lines after the first `skip` that are not blank."""
    with kinds.open_file(file.path, file.compression) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            if skip:
                skip -= 1
                continue
            try:
                record = json.loads(line)  # bytes, whose byte-order mark it drops
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file.path}, line {number:,} is not JSON ({error}): correct or remove it") from error
            yield f"line {number:,}", record


def json_array(file, skip):
    """Yield (place, object) for each element of a JSON array after the first `skip`, parsing JSON_BYTES at a time."""
    parse, number = json.JSONDecoder().raw_decode, 0
    try:
        with io.TextIOWrapper(kinds.open_file(file.path, file.compression), encoding="utf-8-sig", newline="") as stream:
            text = stream.read(JSON_BYTES)
            position = text.index("[") + 1
            while True:
                position = SEPARATORS.match(text, position).end()
                if text.startswith("]", position):
                    break
                try:
                    record, position = parse(text, position)
                except json.JSONDecodeError:  # perhaps only because the element goes on
                    more = stream.read(max(JSON_BYTES, len(text) - position))
                    if not more:
                        raise
                    text, position = text[position:] + more, 0
                    continue
                number += 1
                if number > skip:
                    yield f"element {number:,}", record
            if text[position + 1 :].strip() or stream.read(JSON_BYTES).strip():
                raise ValueError("more follows after the array")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path} is not a JSON array after element {number:,} ({error}): correct it") from error


def _look_up(record, column):
    """record[column], in which a dot may lead into an inner object. Raises KeyError."""
    if isinstance(record, dict):
        if column in record:
            return record[column]
        outer, _, inner = column.partition(".")
        if inner and outer in record:
            return _look_up(record[outer], inner)
    raise KeyError(column)


def _fields(record):
    """The names of a JSON object's fields, those of inner objects as text_column takes them."""
    inner = {name: _fields(value) for name, value in record.items() if isinstance(value, dict) and value}
    return [path for name in record for path in [f"{name}.{field}" for field in inner.get(name, ())] or [name]]


def read_text(file, column, skip):
    """Yield the one text of a plain file, without its byte-order mark, unless it is skipped."""
    if skip:
        return
    if file.kind == "python":
        yield string_array([Path(file.path).read_text(encoding="utf-8", errors="replace")])
        return
    with kinds.open_file(file.path, file.compression) as stream:
        content = stream.read()
    mark, encoding = kinds.byte_order_mark(content)
    try:
        yield string_array([content[len(mark) :].decode(encoding)])
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is not {encoding.upper()} text (byte {len(mark) + error.start:,}): convert it to UTF-8, for "
            "example with iconv, or leave it out"
        ) from error


def valid_texts(batch):
    """The texts of a Batch as a pyarrow array of large strings. Raises ValueError for a row that is not text."""
    import pyarrow as pa

    texts = batch.texts
    if texts.null_count:
        row = batch.first + texts.is_null().to_pylist().index(True)
        raise ValueError(f"{batch.path}, row {row:,} (from 0) is null, not text: remove the row, or put a text there")
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        texts = texts.cast(pa.large_string())
    # The same as a cast, which would import all of pyarrow.compute; and without the validity bitmap.
    _, offsets, content = texts.buffers()
    offsets = np.frombuffer(offsets, np.int32 if pa.types.is_string(texts.type) else np.int64)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    texts = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), content or pa.py_buffer(b""))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        rows = f"rows {batch.first:,} to {batch.first + len(texts) - 1:,}"
        raise ValueError(
            f"{batch.path}, one of {rows} is not UTF-8 text ({error}): correct or replace the file, then repeat the "
            "command to resume"
        ) from error
    return texts


def string_array(texts):
    """A list of strings as a pyarrow array; half a surrogate pair, which JSON can spell, becomes U+FFFD.

    tiktoken does the same. pa.array would import pandas, which takes as long as the rest of a small preparation.
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
    """About how many bytes of text a file holds. Raises ValueError for a file without the column or a damaged one."""
    import pyarrow.parquet as pq

    if file.kind != "parquet":
        return os.path.getsize(file.path) * (COMPRESSION_RATIO if file.compression else 1)
    with kinds.read_errors(file.path):
        metadata, schema = pq.read_metadata(file.path), pq.read_schema(file.path)
    _require_text(file, schema, column)
    place = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(group).column(place).total_uncompressed_size for group in groups)


def _require_text(file, schema, column):
    """Raise ValueError unless `column` of a Parquet schema, or the field of its structs, is text."""
    import pyarrow as pa

    types = {}  # of every column, and of every field of a struct

    def collect(fields, outer=""):
        for field in fields:
            types[outer + field.name] = field.type
            if pa.types.is_struct(field.type):
                collect([field.type.field(i) for i in range(field.type.num_fields)], f"{outer}{field.name}.")

    collect(schema)
    if column not in types:
        names = [name for name, kind in types.items() if not pa.types.is_struct(kind)]
        raise ValueError(f"{file.path} has no column {column!r}, only {', '.join(names)}: set --text_column")
    kind = types[column]
    if pa.types.is_struct(kind):
        inner = [name for name in types if name.startswith(f"{column}.")]
        raise ValueError(f"{file.path}: the column {column!r} is a struct: set --text_column to {' or '.join(inner)}")
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{file.path}: the column {column!r} is of type {kind}, not text: set --text_column")
