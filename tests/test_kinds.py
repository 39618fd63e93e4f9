"""What a file is, by its name and its content, and what is refused."""

import bz2
import codecs
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import arguments, read_texts

from corpus import reading, sources

TEXTS = [f"document {i}: caf\xe9 \u4e2d\n{{}} [" for i in range(40)]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)).encode()
ARRAY = json.dumps([{"text": text, "id": [1]} for text in TEXTS]).encode()
INDENTED = json.dumps([{"text": text} for text in TEXTS], indent=2).encode()
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}), sink)
    return sink.getvalue().to_pybytes()


SAME_DOCUMENTS = {  # name -> content
    **dict.fromkeys(("a.jsonl", "a.JSONL", "a.jsonlines", "a.ndjson", "A.NDJSON", "a.jl", "a.json", "a.JSON"), LINES),
    **dict.fromkeys(("part-00000", "dump.txt", "a.log"), LINES),
    **{f"a.jsonl.{ending}": compress(LINES) for ending, compress in COMPRESS.items()},
    **{f"a.JSONLines.{ending.upper()}": compress(LINES) for ending, compress in COMPRESS.items()},
    **{f"dump.{ending}": compress(LINES) for ending, compress in COMPRESS.items()},
    **{f"a.json.{ending}": compress(INDENTED) for ending, compress in COMPRESS.items()},
    "a.jsonl.zst": zstd(LINES),
    "a.ndjson.ZST": zstd(LINES),
    "dump.zstd": zstd(LINES),
    "no ending": gzip.compress(LINES),
    "wrong ending.jsonl": bz2.compress(LINES),
    "several.jsonl.gz": gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]),
    "several.jsonl.bz2": bz2.compress(LINES[:1000]) + bz2.compress(LINES[1000:]),
    "several.jsonl.zst": zstd(LINES[:1000]) + zstd(LINES[1000:]),
    "skippable.jsonl.zst": b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zstd(LINES),
    "mark.jsonl": codecs.BOM_UTF8 + LINES,
    "blank lines.jsonl": b"\n \n" + LINES.replace(b"\n", b"\r\n\n"),
    "long line.txt": json.dumps({"other": "x" * 100_000, "text": TEXTS[0]}).encode() + b"\n" + LINES.split(b"\n", 1)[1],
    "array.json": ARRAY,
    "array.jsonl": ARRAY,
    "array": INDENTED,
    "mark.json": codecs.BOM_UTF8 + b" \n" + ARRAY + b"\n",
    "a.parquet": parquet(),
    "a.PARQUET": parquet(),
    "part-1": parquet(),
}


@pytest.mark.parametrize("name", SAME_DOCUMENTS)
def test_the_kind_of_a_file_is_recognised_by_ending_and_content(tmp_path, name):
    (tmp_path / name).write_bytes(SAME_DOCUMENTS[name])
    assert read_texts(tmp_path / name) == TEXTS
    assert read_texts(tmp_path / name, skip=17) == TEXTS[17:]


ONE_DOCUMENT = {  # name -> (content, text)
    "a.txt": (b"text\r\n\n", "text\r\n\n"),
    "A.TXT": (b"text", "text"),
    "README": (b"text", "text"),
    "empty.txt": (b"", ""),
    "a.md": (b"[link](there)\n", "[link](there)\n"),
    "a.c": (b"{\n  int i;\n}\n", "{\n  int i;\n}\n"),
    "object.txt": (b'{\n "text": 1\n}\n', '{\n "text": 1\n}\n'),
    "begins.txt": (b"{}\nand goes on\n", "{}\nand goes on\n"),
    "brackets.txt": (b"[{note} a]", "[{note} a]"),
    "version.txt": (b"version 2", "version 2"),
    "BZhang.txt": (b"BZhang", "BZhang"),
    "a.txt.gz": (gzip.compress(b"text"), "text"),
    "a.TXT.XZ": (lzma.compress(b"text"), "text"),
    "a.bz2": (bz2.compress(b""), ""),
    "mark.txt": (codecs.BOM_UTF8 + b"caf\xc3\xa9", "caf\xe9"),
    "inner mark.txt": ("a\ufeffb".encode(), "a\ufeffb"),
    "utf16le.txt": (codecs.BOM_UTF16_LE + "caf\xe9 \U0001f600".encode("utf-16-le"), "caf\xe9 \U0001f600"),
    "utf16be.txt": (codecs.BOM_UTF16_BE + "caf\xe9".encode("utf-16-be"), "caf\xe9"),
    "utf32.txt": ("caf\xe9".encode("utf-32"), "caf\xe9"),
    "utf16.txt.gz": (gzip.compress("caf\xe9".encode("utf-16")), "caf\xe9"),
}


@pytest.mark.parametrize("name", ONE_DOCUMENT)
def test_a_plain_file_is_one_document_without_its_byte_order_mark(tmp_path, name):
    content, text = ONE_DOCUMENT[name]
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == [text]


REFUSED = {  # name -> (content, what the line says)
    "a.csv": (b"id,text\n1,a\n", "a table: convert it to Parquet or JSON Lines"),
    "A.TSV": (b"id\ttext\n", "a table"),
    "a.csv.gz": (gzip.compress(b"id,text\n"), "a table"),
    "a.arrow": (b"ARROW1\0\0", "a table"),
    "arrow": (b"ARROW1\0\0", "a table"),
    "a.zip": (b"PK\x03\x04", "an archive: extract it"),
    "zip": (b"PK\x03\x04", "an archive"),
    "a.tar.gz": (gzip.compress(b"a"), "an archive"),
    "a.TGZ": (gzip.compress(b"a"), "an archive"),
    "tar.gz": (gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0"), "an archive"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c", "an archive"),
    "a.jsonl.lz4": (b"\x04\x22\x4d\x18", "compressed in an unsupported format: decompress it"),
    "a.pdf": (b"%PDF-1.4\n", "a document with formatting: convert it to plain text"),
    "pdf": (b"%PDF-1.4\n", "a document with formatting"),
    "a.docx": (b"PK\x03\x04", "a document with formatting"),
    "a.txt": (b"{\\rtf1 text}", "a document with formatting"),
    "a.png": (b"\x89PNG\r\n", "an image"),
    "photo": (b"\xff\xd8\xff\xe0", "an image"),
    "a.npy": (b"\x93NUMPY\x01\0", "is not text, it has NUL bytes"),
    "nul.txt": (b"text\0text", "is not text, it has NUL bytes"),
    "utf16.txt": ("text".encode("utf-16-le"), "is not text, it has NUL bytes"),
    "nul.txt.gz": (gzip.compress(b"text\0text"), "is not text, it has NUL bytes"),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a.jsonl.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a.jsonl.gz.gz": (gzip.compress(gzip.compress(LINES)), "compressed twice"),
    "a.parquet.gz": (gzip.compress(parquet()), "decompress it"),
    "fake.jsonl.gz": (LINES, "its name ends as that of a gzip file"),
    "object.json": (b'{\n  "data": [\n  ]\n}\n', "one object per line (JSON Lines), or one array of objects"),
    "column.json": (b'{"data": [{"text": "a"}]}', "line 1 has no field 'text', only data"),
    "strings.json": (b'["a", "b"]', "element 1 has no field 'text'"),
    "empty.json": (b"[]", "the source has no documents"),
    "field.json": (b'[{"text": "a"}, {"body": "b"}]', "element 2 has no field 'text', only body"),
    "null.json": (b'[{"text": null}]', "element 1: the field 'text' is null, not text"),
    "cut.json": (ARRAY[:-5], "is not a JSON array after element 39"),
    "broken.json": (b'[{"text": "a"}, {"text": "b" "c"}]', "is not a JSON array after element 1"),
    "more.json": (ARRAY + ARRAY, "more follows after the array"),
    "latin.json": (b'[{"text": "caf\xe9"}]', "is not a JSON array after element 0"),
    "utf16.json": ('{"text": "a"}'.encode("utf-16"), "convert it to UTF-8"),
    "html.jsonl": (b"<!DOCTYPE html>\n<html></html>\n", "line 1 is not JSON"),
    "utf16-cut.txt": (codecs.BOM_UTF16_LE + b"abc", "is not UTF-16-LE text"),
    "cut.txt.xz": (lzma.compress(b"text" * 99)[:-9], "cannot be read"),
    "cut.txt.bz2": (bz2.compress(b"text" * 99)[:-9], "cannot be read"),
    "damaged.txt.xz": (lzma.compress(b"text" * 99)[:40] + b"!" * 40, "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_text_is_refused_in_one_line_that_says_what_to_do(tmp_path, refuses, name):
    content, expected = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    words = [expected] if "no documents" in expected else [tmp_path / name, expected]
    refuses(*arguments(tmp_path / name, tmp_path / "out"), words=words)
    assert not list((tmp_path / "out").glob("*.bin"))


@settings(max_examples=100)
@given(
    records=st.lists(st.dictionaries(st.sampled_from(["text", "a", "b"]), st.text() | st.integers() | st.none())),
    indent=st.sampled_from([None, 0, 1, 4]),
    piece=st.integers(1, 60),
    skip=st.integers(0, 3),
)
def test_an_array_is_parsed_in_pieces_of_any_size(tmp_path_factory, records, indent, piece, skip):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "JSON_BYTES", piece)
        found = list(reading.json_array(sources.TextFile(str(path), "a.json", "json"), skip))
    assert [record for _, record in found] == records[skip:]
    assert [place for place, _ in found] == [f"element {i}" for i in range(skip + 1, len(records) + 1)]


# What is wrong in a file


BAD = {  # name of the file -> (how it is written, what the line says)
    "column.parquet": (lambda p: pq.write_table(pa.table({"body": ["a"]}), p), "no column 'text', only body"),
    "number.parquet": (
        lambda p: pq.write_table(pa.table({"text": [1]}), p),
        "the column 'text' is of type int64, not text",
    ),
    "bytes.parquet": (lambda p: pq.write_table(pa.table({"text": [b"a"]}), p), "of type binary, not text"),
    "null.parquet": (lambda p: pq.write_table(pa.table({"text": ["a"] * 9 + [None]}), p), "row 9 (from 0) is null"),
    "cut.parquet": (lambda p: p.write_bytes(b"PAR1 and no more"), "cannot be read"),
    "empty.parquet": (lambda p: p.write_bytes(b""), "cannot be read"),
    "field.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"body": "b"}\n'), "line 2 has no field 'text'"),
    "list.jsonl": (lambda p: p.write_text('["text"]\n'), "line 1 has no field 'text'"),
    "number.jsonl": (
        lambda p: p.write_text('{"text": "a"}\n\n{"text": 3}\n'),
        "line 3: the field 'text' is of type int, not text",
    ),
    "null.jsonl": (lambda p: p.write_text('{"text": null}\n'), "line 1: the field 'text' is null, not text"),
    "broken.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"text": '), "line 2 is not JSON"),
    "latin.jsonl": (lambda p: p.write_bytes(b'{"text": "caf\xe9"}\n'), "line 1 is not JSON"),
    "cut.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9]), "cannot be read"),
    "fake.jsonl.zst": (lambda p: p.write_bytes(b'{"text": "a"}\n'), "cannot be read"),
    "latin.txt": (lambda p: p.write_bytes(b"caf\xe9"), "not UTF-8 text (byte 3)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path, refuses, name):
    write, expected = BAD[name]
    write(tmp_path / name)
    refuses(*arguments(tmp_path / name, tmp_path / "out"), words=[tmp_path / name, expected])
    assert not list((tmp_path / "out").glob("*.bin"))


def test_text_that_is_not_utf8_in_a_string_column_is_found(tmp_path, refuses):
    wrong = pa.array([b"caf\xc3\xa9", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": wrong}), tmp_path / "latin.parquet")
    call = arguments(tmp_path / "latin.parquet", tmp_path / "out")
    refuses(*call, words=[tmp_path / "latin.parquet", "one of rows 0 to 1 is not UTF-8"])
