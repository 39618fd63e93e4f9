"""A preparation that a kill, a damaged file or a disk interrupts is resumed, and ends in the same bins."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_files import (
    arguments,
    copy_vocabulary,
    make_texts,
    prepare,
    reached,
    read_bins,
    reference,
    small_pieces,
    write_jsonl,
    write_shards,
)

import data
import prepare_owt
from configurator import ROOT
from corpus import gathering, token_file
from engine import locks


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    small_pieces(monkeypatch)


# Small pieces, and so slow that a kill comes in the middle.
KILLED = """
import time
import configurator, prepare_owt
from corpus import gathering, reading, token_file
reading.BATCH_BYTES, token_file.COMMIT_BYTES, gathering.MEMORY_BYTES = 2**13, 2**16, 0
gathering.WINDOW_BYTES, token_file.CHUNK_BYTES = 2**16, 2**14
append = token_file.TokenFile.append
token_file.TokenFile.append = lambda *arguments: (time.sleep(0.001), append(*arguments))
configurator.run(prepare_owt.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [8, pytest.param(40, marks=pytest.mark.long)])
def test_killed_at_many_moments_it_ends_in_the_same_bins(tmp_path, n_kills):
    texts = make_texts(12_000)
    pattern = write_shards(tmp_path / "in", texts)
    expected = reference(texts)
    out = tmp_path / "out"
    options = ["--source=files", f"--files={pattern}", "--tokenizer=bytes", "--val_fraction=0.05", f"--out_dir={out}"]
    rng, kills, places = random.Random(1), 0, set()
    while kills < n_kills or not (out / "meta.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if kills < n_kills:
            if rng.random() < 0.8:  # while it encodes or gathers; else while it starts, too
                while line := process.stdout.readline():
                    if line.startswith("needs"):
                        break
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
        output = process.communicate()[0]
        if process.returncode == 0:
            assert read_bins(out) == expected
            if kills < n_kills:
                shutil.rmtree(out)  # and once more
        else:
            assert process.returncode == -signal.SIGKILL, output
            kills += 1
            if (out / "meta.json").exists():
                assert read_bins(out) == expected
            elif (out / "unfinished" / "state.json").exists():
                places.add(reached(out))
    assert read_bins(out) == expected
    assert len(places) > n_kills // 4, "the kills came at different places"


def test_a_damaged_file_keeps_what_was_done_and_is_resumed_when_replaced(tmp_path, refuses, command, monkeypatch):
    monkeypatch.setattr(token_file, "COMMIT_BYTES", 2**40)
    texts = make_texts(3000)
    call = arguments(write_shards(tmp_path / "in", texts, 5), tmp_path / "out")
    bad = tmp_path / "in" / "shard-1.parquet"
    good = bad.read_bytes()
    middle = len(good) // 2
    bad.write_bytes(good[:middle] + b"\xff" * 4000 + good[middle + 4000 :])  # its footer is sound
    refuses(*call, words=[bad, "to resume"])
    done = reached(tmp_path / "out")
    before, n = (pq.read_metadata(tmp_path / "in" / f"shard-{i}.parquet").num_rows for i in range(2))
    assert done > before, "a part of the damaged file, too"
    refuses(*call, words=[bad])
    assert reached(tmp_path / "out") == done
    texts[before : before + n] = reversed(texts[before : before + n])  # so that this part must not be kept
    pq.write_table(pa.table({"text": texts[before : before + n]}), bad)
    status, out, _ = command(*call)
    assert status == 0 and f"resuming after {before:,} documents" in out
    assert read_bins(tmp_path / "out") == reference(texts)


def test_files_that_changed_after_they_were_read_are_refused(tmp_path, refuses):
    call = arguments(write_shards(tmp_path / "in", make_texts(3000), 5), tmp_path / "out")
    bad = tmp_path / "in" / "shard-3.parquet"
    good = bad.read_bytes()
    bad.write_bytes(good[:4] + b"\xff" * 3000 + good[3004:])
    refuses(*call, words=[bad])
    refuses(*call, "--text_column=id", words=["other settings", tmp_path / "out" / "unfinished"])
    pq.write_table(pa.table({"text": ["other"]}), tmp_path / "in" / "shard-0.parquet")
    refuses(*call, words=["have changed", tmp_path / "out" / "unfinished"])


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    arguments = (tmp_path, {}, [], np.dtype("<u2"), 256)
    store = token_file.TokenFile(*arguments)
    with pytest.raises(ValueError, match="another process is preparing data"):
        token_file.TokenFile(*arguments)
    store.close()
    token_file.TokenFile(*arguments).close()


@pytest.mark.parametrize("change", ["same size", "time of modification"])
def test_a_finished_file_that_changed_unnoticed_by_its_size_is_refused(tmp_path, refuses, change):
    first, bad = tmp_path / "a.txt", tmp_path / "c.txt"
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_bytes(b"some words\n" * 40_000)
    bad.write_bytes(b"caf\xe9")
    call = arguments(tmp_path / "*.txt", tmp_path / "out")
    refuses(*call, words=[bad, "not UTF-8 text"])
    assert reached(tmp_path / "out") == 2
    content, before = bytearray(first.read_bytes()), first.stat().st_mtime_ns
    content[0 if change == "same size" else 200_000] = ord("X")
    first.write_bytes(content)
    if change == "same size":
        os.utime(first, ns=(before, before))
    refuses(*call, words=["have changed", tmp_path / "out" / "unfinished"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_corrected_column_is_no_other_preparation(tmp_path, refuses, command, kind):
    texts = make_texts(300)
    pattern = write_shards(tmp_path / "in", texts, name=f"{{}}.{kind}", write=write_jsonl if kind == "jsonl" else None)
    call = arguments(pattern, tmp_path / "out")
    for wrong in ("body", "id"):
        refuses(*call, f"--text_column={wrong}", words=["--text_column"])
    assert command(*call)[0] == 0
    assert read_bins(tmp_path / "out") == reference(texts)


def test_a_wrong_column_is_no_preparation_of_another_tokenizer(tmp_path, refuses, monkeypatch):
    copy_vocabulary(tmp_path / "vocabulary", monkeypatch)
    call = arguments(write_shards(tmp_path / "in", make_texts(300)), tmp_path / "out")
    refuses(*call, "--text_column=body", words=["--text_column"])
    refuses(*call, "--tokenizer=gpt2", "--text_column=body", words=["--text_column"])


def test_what_is_refused_before_anything_is_encoded_leaves_nothing(tmp_path, refuses):
    pattern = write_shards(tmp_path / "in", make_texts(30))
    refuses(*arguments(pattern, tmp_path / "new/out", "--text_column=none"), words=["has no column 'none'"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_kill_left_of_the_manifest_goes(tmp_path):
    (tmp_path / "out/unfinished").mkdir(parents=True)
    (tmp_path / "out/.meta.json.123.tmp").touch()
    prepare(write_shards(tmp_path / "in", make_texts(30)), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_the_state_of_another_version_is_one_line(tmp_path, refuses):
    call = arguments(write_shards(tmp_path / "in", make_texts(30)), tmp_path / "out")
    state = tmp_path / "out" / "unfinished" / "state.json"
    state.parent.mkdir(parents=True)
    for content, expected in (('{"settings": {}}', "another version"), ('{"sett', "is not JSON")):
        state.write_text(content)
        refuses(*call, words=[state, expected])


# The disk


MOMENTS = {  # what fails -> where
    "making the folder": (Path, "mkdir"),
    "locking it": (locks, "acquire"),
    "creating the token file": (token_file, "open"),
    "writing the token file": (token_file.TokenFile, "append"),
    "committing": (token_file, "write_json"),
    "measuring the space": (shutil, "disk_usage"),
    "creating a bin": (gathering, "open"),
    "reading the token file": (np, "fromfile"),
    "writing a part of a bin to disk": (os, "fdatasync"),
    "writing a bin to disk": (os, "fsync"),
    "moving a bin": (os, "replace"),
    "writing meta.json": (data, "write_json"),
    "deleting what is no longer needed": (shutil, "rmtree"),
}


@pytest.mark.parametrize("reason", ["ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_of_the_disk_at_any_moment_is_one_line_and_can_be_resumed(
    tmp_path, monkeypatch, refuses, command, moment, reason
):
    monkeypatch.setattr(gathering, "MEMORY_BYTES", 0)
    texts = make_texts(600)
    call = arguments(write_shards(tmp_path / "in", texts), tmp_path / "out")
    code = getattr(errno, reason)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code), *([] if reason == "ENOSPC" else [str(tmp_path / "out" / "there")]))

    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment], fail, raising=False)  # `open` is not a name of the module
        refuses(*call, words=[tmp_path / "out", os.strerror(code)])
    status, _, error = command(*call)
    assert status == 0, error
    assert read_bins(tmp_path / "out") == reference(texts)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_an_error_that_the_disk_reports_once_is_not_lost(tmp_path, monkeypatch, refuses):
    """As Linux does where writing in the background fails: a later fsync of the same file succeeds."""
    monkeypatch.setattr(gathering, "MEMORY_BYTES", 0)
    call = arguments(write_shards(tmp_path / "in", make_texts(600)), tmp_path / "out")
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def sync(_):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fdatasync", sync)
    refuses(*call, words=[tmp_path / "out", os.strerror(errno.EIO)])


@pytest.mark.parametrize("place", ["out", "unfinished"])
def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, refuses, place):
    call = arguments(write_shards(tmp_path / "in", make_texts(30)), tmp_path / "out")
    path = tmp_path / "out" if place == "out" else tmp_path / "out" / "unfinished"
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    refuses(*call, words=[path])


def test_whoever_stops_reading_the_output_sees_no_error_of_the_disk(tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(prepare_owt, "require_space", closed)
    with pytest.raises(BrokenPipeError):  # which configurator.run ends quietly
        prepare(write_shards(tmp_path / "in", make_texts(300)), tmp_path / "out")


def test_the_disk_never_holds_more_than_twice_the_bins(tmp_path, monkeypatch):
    real, sizes = shutil.rmtree, []

    def measure(path, *rest, **options):
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()))
        real(path, *rest, **options)

    monkeypatch.setattr(prepare_owt.shutil, "rmtree", measure)  # the last step: nothing has been deleted before
    prepare(write_shards(tmp_path / "in", make_texts(3000)), tmp_path / "out")
    bins = sum(map(len, read_bins(tmp_path / "out").values()))
    assert max(sizes) < 2 * bins + 4096


def test_too_little_space_is_refused_with_the_figures(tmp_path, monkeypatch):
    texts = ["".join(random.Random(i).choices("abcdefgh ", k=5000)) for i in range(200)]
    pattern = write_shards(tmp_path / "in", texts)
    monkeypatch.setattr(prepare_owt.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_900_000))
    with pytest.raises(ValueError, match=r"4\.0\d MB for 2 × the bins.*3\.90 MB free"):
        prepare(pattern, tmp_path / "out")
    monkeypatch.setattr(prepare_owt.shutil, "disk_usage", lambda path: SimpleNamespace(free=4_100_000))
    prepare(pattern, tmp_path / "out")


def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch, refuses, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        monkeypatch.setattr(token_file, "COMMIT_BYTES", 2**40)
        monkeypatch.setattr(prepare_owt, "require_space", lambda *needs: None)  # as if others filled the disk meanwhile
        texts = ["".join(random.Random(i).choices("abcdefgh ", k=1000)) for i in range(400)]
        call = arguments(write_shards(tmp_path / "in", texts), disk / "out")
        filler = disk / "filler"
        filler.write_bytes(b"x" * 400_000)
        refuses(*call, words=["no space left", disk / "out", "to resume"])  # for the 0.8 MB of tokens
        assert 200 < reached(disk / "out") < 400
        filler.unlink()
        refuses(*call, words=["no space left", disk / "out", "to resume"])  # for the bins
        assert reached(disk / "out") == 400
        subprocess.run(["mount", "-o", "remount,size=3m", str(disk)], check=True, capture_output=True)
        assert command(*call)[0] == 0
        assert read_bins(disk / "out") == reference(texts)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, capture_output=True)


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path, refuses, command):
    texts = make_texts(2000)
    call = arguments(write_shards(tmp_path / "in", texts), tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refuses(*call, words=["no space left", "File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert command(*call)[0] == 0
    assert read_bins(tmp_path / "out") == reference(texts)


# Another operating system


LACKING = """
import os, sys
for name in ("fdatasync", "sched_getaffinity", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)
import errno
del errno.EDQUOT
sys.modules["{module}"] = None
"""


@pytest.mark.parametrize("module", ["resource", "lzma"])
def test_it_works_without_what_other_systems_lack(tmp_path, module):
    """macOS has no fdatasync and no sched_getaffinity; some builds of Python have no lzma."""
    (tmp_path / "sitecustomize.py").write_text(LACKING.format(module=module))
    texts = make_texts(300)
    call = arguments(write_shards(tmp_path / "in", texts), tmp_path / "out")[1:]
    result = subprocess.run(
        [sys.executable, ROOT / "prepare_owt.py", *call],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert read_bins(tmp_path / "out") == reference(texts)


def test_it_is_imported_on_windows(tmp_path):
    """Where msvcrt is in place of fcntl."""
    (tmp_path / "msvcrt.py").touch()
    (tmp_path / "sitecustomize.py").write_text(LACKING.format(module="fcntl"))
    command = [sys.executable, "-W", "ignore", "-c", "import prepare_owt"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == 0
