"""Which kind of file a file is, by its name and its first bytes: Parquet, JSON or plain text, compressed or not.

Names alone do not tell: JSON Lines come as .jsonl, .JSONL, .ndjson, .json or without any ending, and a compressed file
is often named without the ending of what is in it. A file that holds no text is refused with what to do instead, since
its bytes would otherwise be encoded as one long document.
"""

import codecs
import contextlib
import io
import json
import re
from pathlib import PurePath

try:
    import lzma
except ImportError:  # not every Python was built with it
    lzma = None

HEAD_BYTES = 2**16  # of the decompressed content
PARQUET_ENDINGS = {".parquet", ".pq"}
JSON_ENDINGS = {".jsonl", ".jsonlines", ".ndjson", ".jl", ".json"}
COMPRESSION_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
COMPRESSED = {  # name -> how such files begin
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
}
NOT_TEXT = (  # (what it is, what to do, its endings, how such files begin)
    (
        "a git-lfs pointer, not the file itself",
        "download the file with `git lfs pull`",
        "",
        rb"version https://git-lfs\.github\.com/spec/",
    ),
    (
        "a table",
        "convert it to Parquet or JSON Lines, with one document per row",
        ".csv .tsv .xls .xlsx .ods .arrow .feather .orc .avro",
        rb"ARROW1\0|Obj\x01",
    ),
    (
        "an archive",
        "extract it and name the extracted files",
        ".zip .tar .tgz .tbz2 .txz .tzst .7z .rar",
        rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a|(?s:.{257})ustar",
    ),
    (
        "compressed in an unsupported format",
        "decompress it, or compress it with gzip, zstd, bzip2 or xz",
        ".lz4 .lzma .lz .br .z",
        rb"\x04\x22\x4d\x18|LZIP\x01|\x1f\x9d",
    ),
    (
        "a document with formatting",
        "convert it to plain text",
        ".pdf .doc .docx .odt .rtf .epub",
        rb"%PDF-|\{\\rtf|\xd0\xcf\x11\xe0",
    ),
    (
        "an image, a recording or a video",
        "name only files that hold text",
        ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .mp3 .mp4 .wav .flac .ogg .mkv",
        rb"\x89PNG|\xff\xd8\xff|GIF8[79]a",
    ),
)
BYTE_ORDER_MARKS = {  # those of UTF-32 first: one of them begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def recognise(path, name):
    """(kind, compression) of the file at path, whose name is `name`: in the hub's cache a path can end otherwise.

    kind: 'parquet', 'jsonl' (one JSON object per line), 'json' (an array of objects) or 'text' (one document).
    compression: 'gzip', 'zstd', 'bz2', 'xz' or None. Raises ValueError, saying what to do, for a file that is not one
    of these.
    """
    name = PurePath(name)
    expected = COMPRESSION_ENDINGS.get(name.suffix.lower())
    ending = PurePath(name.stem if expected else name).suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    _refuse_what_is_not_text(path, ending, head)
    compression = _compression(head)
    if expected not in (None, compression):
        raise ValueError(f"{path} cannot be read: its name ends as that of a {expected} file, its content is none")
    with read_errors(path), open_file(path, compression) as file:
        head = file.read(HEAD_BYTES)
        if head.lstrip().startswith(b"{") and b"\n" not in head.strip():
            head += file.readline()  # the whole first line, to tell whether it is JSON
    if compression:
        _refuse_what_is_not_text(path, "", head)
        if _compression(head):
            raise ValueError(f"{path} is compressed twice: decompress it once")
    if head.startswith(b"PAR1") or ending in PARQUET_ENDINGS:
        if compression:
            raise ValueError(f"{path} is a Parquet file in a {compression} file: decompress it")
        return "parquet", None
    mark, encoding = byte_order_mark(head)
    text = head[len(mark) :].decode(encoding, "ignore")
    if "\0" in text:
        raise ValueError(f"{path} is not text, it has NUL bytes: name only text files, in UTF-8")
    kind = _json_kind(path, ending, text.lstrip()) or "text"
    if kind != "text" and encoding != "utf-8":
        raise ValueError(f"{path} is JSON in {encoding.upper()}: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return kind, compression


def _compression(head):
    return next((name for name, pattern in COMPRESSED.items() if re.match(pattern, head)), None)


def _refuse_what_is_not_text(path, ending, head):
    by_name = [entry[:2] for entry in NOT_TEXT if ending and ending in entry[2].split()]
    by_content = [entry[:2] for entry in NOT_TEXT if re.match(entry[3], head)]
    for what, advice in [*by_name, *by_content][:1]:
        raise ValueError(f"{path} is {what}: {advice}")


def _json_kind(path, ending, text):
    """'jsonl', 'json' or None for a file with this ending, whose text begins so."""
    is_named_json = ending in JSON_ENDINGS
    if text.startswith("["):
        first = text[1:].lstrip()
        if first.startswith("{") and (is_named_json or _begins_with_an_object(first)):
            return "json"
        if ending == ".json":
            return "json"
    elif text.startswith("{"):
        line, _, rest = text.partition("\n")
        try:
            json.loads(line)
            if is_named_json or rest.lstrip()[:1] in ("", "{"):
                return "jsonl"
        except json.JSONDecodeError as error:
            if is_named_json and error.pos >= len(line.rstrip()):
                raise ValueError(
                    f"{path} begins with a JSON object that does not end in its line: write one object per line (JSON "
                    "Lines), or one array of objects"
                ) from error
    return "jsonl" if is_named_json else None


def _begins_with_an_object(text):
    try:
        json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return True


def byte_order_mark(content):
    """(mark, encoding): the byte-order mark with which bytes begin, b"" where there is none, and what it says."""
    return next((entry for entry in BYTE_ORDER_MARKS.items() if content.startswith(entry[0])), (b"", "utf-8"))


def open_file(path, compression):
    """A buffered binary stream of the decompressed content of a file."""
    import pyarrow as pa

    if compression == "xz":
        if lzma is None:
            raise ValueError(f"{path} cannot be read: this Python was built without xz (lzma): decompress the file")
        return lzma.open(path)
    stream = pa.CompressedInputStream(path, compression) if compression else pa.OSFile(path)
    return io.BufferedReader(stream, 2**20)


@contextlib.contextmanager
def read_errors(path):
    """Raise ValueError, naming the file, in place of what reading or decompressing it raises."""
    import pyarrow as pa

    damage = (pa.ArrowException, OSError, EOFError) + ((lzma.LZMAError,) if lzma else ())
    try:
        yield
    except damage as error:
        if getattr(error, "errno", None) and getattr(error, "strerror", None):  # the system's, not the library's
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}): it is damaged or cut short. What was done is kept: replace "
            "the file (one from the hub: delete it), then repeat the command to resume"
        ) from error


def first_line(error):
    """The type of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
