"""Which files are read, and which of their columns; the form of the files does not matter."""

import errno
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_files import (
    arguments,
    make_texts,
    prepare,
    read_bins,
    read_texts,
    reference,
    small_pieces,
    write_jsonl,
    write_shards,
)

from corpus import kinds, reading, sources


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    small_pieces(monkeypatch)


def test_the_form_of_the_files_does_not_matter(tmp_path):
    texts = make_texts(300)

    def typed(kind):
        return lambda path, part: pq.write_table(
            pa.table({"text": pa.array(part).cast(kind)}), path, compression="zstd"
        )

    def text_file(path, part):
        for i, text in enumerate(part):
            (path.parent / f"{path.name}-{i:04d}.txt").write_bytes(text.encode())

    writers = {
        "{}.parquet": typed(pa.large_string()),
        "dictionary-{}.parquet": typed(pa.dictionary(pa.int32(), pa.string())),
        "{}.jsonl": write_jsonl,
        "{}.jsonl.gz": write_jsonl,
        "{}.jsonl.zst": write_jsonl,
        "{}": text_file,
    }
    for i, (name, write) in enumerate(writers.items()):
        # A plain file with NUL bytes is binary.
        here = [text.replace("\0", "") for text in texts] if write is text_file else texts
        pattern = write_shards(tmp_path / f"in{i}", here, name=name, write=write)
        prepare(pattern, tmp_path / f"out{i}")
        assert read_bins(tmp_path / f"out{i}") == reference(here), name


def test_half_a_surrogate_pair_is_read_as_tiktoken_reads_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n\n{"text": "\\ud83d\\ude00"}\n')
    texts = [text for batch in reading.batches([sources.text_file(str(tmp_path / "a.jsonl"), "a.jsonl")], "text")
             for text in batch.texts.to_pylist()]  # fmt: skip
    assert texts == ["a\ufffd b", "\U0001f600"]


@pytest.mark.parametrize("name", ["{}.parquet", "{}.jsonl.gz"])
def test_reading_can_begin_at_any_document(tmp_path, name):
    texts = make_texts(40)
    write_shards(tmp_path, texts, 1, name, write_jsonl if "jsonl" in name else None)
    file = sources.text_file(str(tmp_path / name.format(0)), name)
    for skip in range(len(texts) + 1):
        found = list(reading.batches([file], "text", 0, skip))
        assert [text for batch in found for text in batch.texts.to_pylist()] == texts[skip:]
        assert [batch.first for batch in found[:1]] == [skip][: len(found)]


def test_memory_does_not_depend_on_the_size_of_a_row_group(tmp_path):
    texts = [random.Random(i).randbytes(2000).hex() for i in range(10_000)]  # 40 MB
    pq.write_table(pa.table({"text": texts}), tmp_path / "one.parquet", row_group_size=10**6)
    before, peak, n = pa.total_allocated_bytes(), 0, 0
    for batch in reading.batches([sources.text_file(str(tmp_path / "one.parquet"), "one.parquet")], "text"):
        n += len(batch.texts)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert n == len(texts) and peak < 16e6


# The column


TEXTS = [f"document {i}: caf\xe9 \u4e2d" for i in range(40)]
NESTED = [{"data": {"text": text, "more": {"text": text}}, "a.b": text, "other": 1} for text in TEXTS]


@pytest.mark.parametrize("column", ["data.text", "data.more.text", "a.b"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_column_can_be_a_field_of_an_object_or_struct(tmp_path, name, column):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), path, row_group_size=7)
        assert sources.text_file(str(path), name).kind == "parquet"
    else:
        lines = "".join(json.dumps(record) + "\n" for record in NESTED)
        path.write_text(lines if name == "a.jsonl" else json.dumps(NESTED))
    assert read_texts(path, column) == TEXTS
    assert read_texts(path, column, skip=10) == TEXTS[10:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("column", ["text", "data", "data.tex", "data.text.x", "other"])
def test_a_wrong_column_is_one_line(tmp_path, refuses, name, column):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    call = arguments(path, tmp_path / "out", f"--text_column={column}")
    refuses(*call, words=[path, repr(column), "set --text_column"])
    if column not in ("data", "other"):
        refuses(*call, words=["only data.text, data.more.text, a.b, other"])


def test_a_struct_that_is_null_is_a_null_row(tmp_path, refuses):
    data = pa.array([{"text": "a"}, None, {"text": "b"}])
    pq.write_table(pa.table({"data": data}), tmp_path / "a.parquet")
    call = arguments(tmp_path / "a.parquet", tmp_path / "out", "--text_column=data.text")
    refuses(*call, words=[tmp_path / "a.parquet", "row 1 (from 0) is null"])


# --files


TREE = (
    "a.txt",
    "b.txt",
    "in/c.txt",
    "in/deep/d.txt",
    "in/deep/e.md",
    "x[1].txt",
    "x*.txt",
    "one, two.txt",
    "d[0]/f.txt",
)
HIDDEN = (".hidden.txt", "in/.git/g.txt")
PATTERNS = {  # --files -> what it stands for
    "a.txt": "a.txt",
    "?.txt": "a.txt b.txt",
    "a.txt,b.txt": "a.txt b.txt",
    "b.txt, a.txt,": "a.txt b.txt",
    "a.txt,*.txt,./b.txt": "a.txt b.txt one,_two.txt x*.txt x[1].txt",
    "**/**/*.txt": "a.txt b.txt d[0]/f.txt in/c.txt in/deep/d.txt one,_two.txt x*.txt x[1].txt",
    "in": "in/c.txt in/deep/d.txt in/deep/e.md",
    "in/": "in/c.txt in/deep/d.txt in/deep/e.md",
    "in,in/**/*.txt": "in/c.txt in/deep/d.txt in/deep/e.md",
    "in/*": "in/c.txt",
    "x[1].txt": "x[1].txt",
    "x*.txt": "x*.txt",
    "x[[]1].txt": "x[1].txt",
    "one, two.txt": "one,_two.txt",
    "d[0]": "d[0]/f.txt",
    "d[0]/*.txt": "d[0]/f.txt",
    ".hidden.txt": ".hidden.txt",
    "~/a.txt": "~/a.txt",
    "a.txt,~": "~/a.txt a.txt",
    "link.txt,a.txt": "a.txt",
    "around/in/c.txt,in/c.txt": "around/in/c.txt",
}


@pytest.mark.parametrize("patterns", PATTERNS)
def test_files_takes_files_folders_and_patterns_and_reads_each_file_once(tmp_path, monkeypatch, patterns):
    home, tree = tmp_path / "home", tmp_path / "tree"
    for path in [home / "a.txt", *(tree / name for name in (*TREE, *HIDDEN))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(home))
    if "link" in patterns or "around" in patterns:
        (tree / "link.txt").symlink_to("a.txt")
        (tree / "around").symlink_to(".")
    expected = [name.replace("_", " ").replace("~", str(home)) for name in PATTERNS[patterns].split()]
    assert sources.matching_files(patterns) == expected


def test_a_folder_with_a_link_to_itself_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(".")
    assert sources.matching_files(str(tmp_path)) == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("patterns", ["nothing*", "a.txt,nothing.txt", "empty", "empty/*", ","])
def test_each_element_of_files_must_match(tmp_path, monkeypatch, refuses, patterns):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    refuses(*arguments(patterns, "out"), words=["no file matches"])


def test_a_file_of_the_hub_may_be_downloaded_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n" * 40_000)
    for is_pinned in (False, True):
        before = sources.text_file(str(path), "a.txt", is_pinned)
        identity, record = before.identity, before.record()
        os.utime(path, ns=(10**18 + is_pinned, 10**18 + is_pinned))
        after = sources.text_file(str(path), "a.txt", is_pinned)
        assert (after.identity == identity) == is_pinned
        assert after.record() != record


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path, refuses, kind):
    path = tmp_path / "a.txt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nowhere")
    refuses(*arguments(tmp_path / "*.txt", tmp_path / "out"), words=[path, "neither a file nor a folder"])


def test_a_file_that_may_not_be_read_is_one_line_with_the_reason(tmp_path, monkeypatch, refuses):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name, function in ((kinds, "open_file"), (sources.TextFile, "record"), (os, "fstat")):
        with monkeypatch.context() as patch:
            patch.setattr(name, function, refuse)
            refuses(*arguments(path, tmp_path / "out"), words=[path, "Permission denied"])
