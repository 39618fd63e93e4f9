"""Files are written whole or not at all; what is wrong with one is one sentence."""

import errno
import os
from pathlib import Path

import pytest

from engine import files


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [lambda path: files.write_json(path, {"new": 2}), lambda path: files.link(path, "b")])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, write):
    for name in "ab":
        files.write_json(tmp_path / name, {"old": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        ValueError, match=r"cannot write .*: No space left on device; the file before, if any, is intact"
    ):
        write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert files.read_json(tmp_path / "a") == files.read_json(tmp_path / "b") == {"old": 1}


@pytest.mark.parametrize("first", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_what_went_wrong_first_is_what_is_raised(tmp_path, first):
    """torch.save raises a RuntimeError about positions where a write of its file object failed."""

    def write(file):
        try:
            raise first
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    kind, words = (ValueError, "No space left") if isinstance(first, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(kind, match=words):
        files.write_atomically(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ValueError, match="something that is not a file"):
        files.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").is_fifo()


def test_the_names_of_new_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "sync_folder", flushed.append)
    assert files.make_folder(tmp_path / "a/b") == [tmp_path / "a/b", tmp_path / "a"]
    assert flushed == [tmp_path / "a", tmp_path]
    assert files.make_folder(tmp_path / "a/b") == []


def test_temporary_files_of_writers_that_were_killed_go(tmp_path):
    (tmp_path / ".ckpt.pt.123.tmp").touch()
    (tmp_path / "kept.tmp").touch()
    files.remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.tmp"]


def test_a_link_is_the_file_that_was_there_then(tmp_path):
    files.write_text(tmp_path / "a", "first")
    files.link(tmp_path / "a", "b")
    files.link(tmp_path / "a", "b")  # renaming a name of a file to another name of it does nothing
    files.write_text(tmp_path / "a", "second")
    assert (tmp_path / "b").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON (Expecting"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"3", "must hold a JSON object, got int"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        files.read_json(tmp_path / "x.json")
    assert words in str(refusal.value) and "x.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_json_file_is_none_and_a_folder_is_refused(tmp_path):
    assert files.read_json(tmp_path / "none.json") is None
    assert files.read_json(Path(__file__) / "none.json") is None
    with pytest.raises(ValueError, match="cannot read"):
        files.read_json(tmp_path)
