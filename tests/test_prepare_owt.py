"""The bins are those of the literal recipe, whatever the source's form, the interruptions and the accidents."""

import gzip
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare_owt
from corpus import encoding, gathering, sources, token_file, tokenizers
from prepare_owt import PrepareConfig, main

ROOT = Path(__file__).parent.parent
UNICODE = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
ODD_TEXTS = [
    "",
    "",
    " ",
    tokenizers.END_OF_TEXT,
    f"a {tokenizers.END_OF_TEXT}b{tokenizers.END_OF_TEXT}",
    "\n\n \t\r\n",
    "\0",
    "n" * 5000,
]


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """GPT-2's vocabulary as tiktoken keeps it, in a copy, as tiktoken deletes files that it finds damaged."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not all((Path(folder) / name).is_file() for name in tokenizers.GPT2_VOCABULARY.values()):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder with GPT-2's vocabulary")
    copy = tmp_path / "vocabulary"
    copy.mkdir()
    for name in tokenizers.GPT2_VOCABULARY.values():
        shutil.copyfile(Path(folder) / name, copy / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
    return copy


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Several batches, windows and commits, although the corpora of the tests are small."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 2**14)
    monkeypatch.setattr(gathering, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(gathering, "WINDOW_BYTES", 2**16)
    monkeypatch.setattr(token_file, "CHUNK_BYTES", 2**15)
    monkeypatch.setattr(token_file, "COMMIT_BYTES", 2**15)


def make_texts(n, seed=0):
    """n documents: odd ones, all of Unicode, and words."""
    rng = random.Random(seed)
    words = [UNICODE[i : i + rng.randint(1, 9)] for i in range(65, 20_000, 37)] + ["the", " and", "\n", "don't", "3.14"]
    texts = ODD_TEXTS + [UNICODE[i : i + 2000] for i in range(0, len(UNICODE), 2000)]
    texts = texts[: n // 2] + [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(n)]
    texts = texts[:n]
    rng.shuffle(texts)
    return texts


def write_shards(folder, texts, n_shards=3, name="shard-{}.parquet", write=None):
    """Documents in n_shards files of uneven sizes; returns the glob that matches them."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [len(texts) * i * (i + 1) // (n_shards * (n_shards + 1)) for i in range(n_shards + 1)]
    for i in range(n_shards):
        part, path = texts[bounds[i] : bounds[i + 1]], folder / name.format(i)
        if write:
            write(path, part)
        else:
            pq.write_table(
                pa.table({"id": range(len(part)), "text": part}), path, row_group_size=(7, 1000, 10**6)[i % 3]
            )
    return str(folder / name.format("*"))


def write_jsonl(path, texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def reference(texts, tokenizer="bytes", val_fraction=0.05, seed=2357):
    """split -> the bytes of its bin, by the recipe that everybody knows."""
    encoding = tokenizers.get_tokenizer(tokenizer)
    parts = datasets.Dataset.from_dict({"text": texts}).train_test_split(val_fraction, seed=seed, shuffle=True)
    return {
        name: np.array(
            [token for text in part["text"] for token in [*encoding.encode_ordinary(text), encoding.eot_token]],
            np.uint16,
        ).tobytes()
        for name, part in (("train", parts["train"]), ("val", parts["test"]))
    }


def prepare(pattern, out_dir, **options):
    options = {"tokenizer": "bytes", "val_fraction": 0.05, **options}
    return prepare_owt.prepare(PrepareConfig(source="files", files=str(pattern), out_dir=str(out_dir), **options))


def arguments(pattern, out_dir, *more):
    """The command line that stands for prepare()."""
    options = [f"--files={pattern}", f"--out_dir={out_dir}", "--tokenizer=bytes", "--val_fraction=0.05"]
    return [main, "--source=files", *options, *more]


def read_bins(folder):
    return {name: (Path(folder) / f"{name}.bin").read_bytes() for name in ("train", "val")}


def reached(out_dir):
    """The number of documents that an unfinished preparation has done."""
    return json.loads((Path(out_dir) / "unfinished" / "state.json").read_text())["reached"][0]


def without_gigatoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)


# The bins


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken", "bytes"])
def test_bins_equal_the_literal_recipe(tmp_path, request, monkeypatch, encoder):
    if encoder != "bytes":
        request.getfixturevalue("vocabulary")
    texts = make_texts(10_000)
    assert (
        len(texts) == 10_000 and set("".join(texts)) >= set(UNICODE) and tokenizers.END_OF_TEXT in texts and "" in texts
    )
    if encoder == "gigatoken":
        pytest.importorskip("gigatoken")
    else:
        without_gigatoken(monkeypatch)
    tokenizer = "bytes" if encoder == "bytes" else "gpt2"
    manifest = prepare(write_shards(tmp_path / "in", texts), tmp_path / "out", tokenizer=tokenizer, val_fraction=0.0005)
    expected = reference(texts, tokenizer, val_fraction=0.0005)
    assert read_bins(tmp_path / "out") == expected
    assert manifest["encoder"] == encoder
    for name, content in expected.items():
        assert manifest["splits"][name]["tokens"] == len(content) // 2
        assert manifest["splits"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert {name: manifest["splits"][name]["documents"] for name in expected} == {"train": 9995, "val": 5}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert len(data.load_bins(tmp_path, "out").train) == len(expected["train"]) // 2


@pytest.mark.parametrize("seed", [2357, 0])
@pytest.mark.parametrize("fraction", [0.0005, 0.05, 0.3])
@pytest.mark.parametrize("n", [2, 7, 1000, 12_345])
def test_the_split_is_that_of_train_test_split(n, fraction, seed):
    parts = datasets.Dataset.from_dict({"i": range(n)}).train_test_split(fraction, seed=seed, shuffle=True)
    ours = gathering.split(n, fraction, seed)
    assert ours["train"].tolist() == parts["train"]["i"][:]
    assert ours["val"].tolist() == parts["test"]["i"][:]


def test_the_form_of_the_files_does_not_matter(tmp_path):
    texts = make_texts(300)
    expected = reference(texts)

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
        pattern = write_shards(tmp_path / f"in{i}", texts, name=name, write=write)
        prepare(pattern, tmp_path / f"out{i}")
        assert read_bins(tmp_path / f"out{i}") == expected, name


def test_half_a_surrogate_pair_is_read_as_tiktoken_reads_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n\n{"text": "\\ud83d\\ude00"}\n')
    texts = [text for batch in sources.batches([sources.text_file(str(tmp_path / "a.jsonl"), "a.jsonl")], "text")
             for text in batch.texts.to_pylist()]  # fmt: skip
    assert texts == ["a\ufffd b", "\U0001f600"]


@pytest.mark.parametrize("name", ["{}.parquet", "{}.jsonl.gz"])
def test_reading_can_begin_at_any_document(tmp_path, name):
    texts = make_texts(40)
    write_shards(tmp_path, texts, 1, name, write_jsonl if "jsonl" in name else None)
    file = sources.text_file(str(tmp_path / name.format(0)), name)
    for skip in range(len(texts) + 1):
        found = list(sources.batches([file], "text", 0, skip))
        assert [text for batch in found for text in batch.texts.to_pylist()] == texts[skip:]
        assert [batch.first for batch in found[:1]] == [skip][: len(found)]


def test_memory_does_not_depend_on_the_size_of_a_row_group(tmp_path):
    texts = [random.Random(i).randbytes(2000).hex() for i in range(10_000)]  # 40 MB
    pq.write_table(pa.table({"text": texts}), tmp_path / "one.parquet", row_group_size=10**6)
    before, peak, n = pa.total_allocated_bytes(), 0, 0
    for batch in sources.batches([sources.text_file(str(tmp_path / "one.parquet"), "one.parquet")], "text"):
        n += len(batch.texts)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert n == len(texts) and peak < 16e6


@settings(max_examples=80)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=60),
    memory=st.integers(0, 4000),
    window=st.integers(1, 400),
    chunk=st.integers(1, 400),
    seed=st.integers(0, 9),
)
def test_gather_puts_documents_in_order_whatever_the_windows(tmp_path_factory, lengths, memory, window, chunk, seed):
    folder, eot, dtype = tmp_path_factory.mktemp("gather"), 256, np.dtype("<u2")
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, 256, n), eot).astype(dtype) for n in lengths]
    np.concatenate(documents).tofile(folder / "tokens.bin")
    orders = gathering.split(len(documents), 0.2, seed)
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "MEMORY_BYTES", memory)
        patch.setattr(gathering, "WINDOW_BYTES", 2 * window)
        patch.setattr(token_file, "CHUNK_BYTES", 2 * chunk)
        ends = np.cumsum(token_file.document_lengths(folder / "tokens.bin", dtype, eot, len(documents)))
        splits = gathering.gather(folder / "tokens.bin", ends, orders, folder, dtype, done.append)
    for name, order in orders.items():
        expected = np.concatenate([documents[i] for i in order])
        assert (folder / f"{name}.bin").read_bytes() == expected.tobytes()
        assert splits[name]["tokens"] == len(expected)
        assert splits[name]["sha256"] == hashlib.sha256(expected).hexdigest()
    assert sum(done) == 4 * (folder / "tokens.bin").stat().st_size


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the sums are those of Python 3.11.7's library")
def test_the_embedded_corpus_is_the_one_whose_results_are_known(tmp_path):
    manifest = prepare_owt.prepare(PrepareConfig(source="stdlib", out_dir=str(tmp_path)))
    sums = {name: manifest["splits"][name]["sha256"][:12] for name in ("train", "val")}
    assert sums == {"train": "e9aaac5830e2", "val": "190b6cbdad39"}
    assert manifest["split"] == {"seed": 2357, "val_fraction": 0.05} and manifest["tokenizer"] == "bytes"


# gigatoken


def test_gigatoken_that_disagrees_is_replaced_from_the_beginning(tmp_path, vocabulary, monkeypatch, capsys):
    pytest.importorskip("gigatoken")
    texts = make_texts(2000)
    pattern = write_shards(tmp_path / "in", texts)
    state = tmp_path / "out" / "unfinished" / "state.json"
    real = encoding.Encoder._try_gigatoken

    def wrong_once(encoder):
        real(encoder)
        encode = encoder._encode

        def wrong_later(texts):
            ids, offsets = encode(texts)
            return (ids[::-1] if state.exists() else ids), offsets

        encoder._encode = wrong_later

    monkeypatch.setattr(encoding.Encoder, "_try_gigatoken", wrong_once)
    manifest = prepare(pattern, tmp_path / "out", tokenizer="gpt2")
    assert "gigatoken disagrees with tiktoken" in capsys.readouterr().out
    assert manifest["encoder"] == "tiktoken" and "gigatoken" not in manifest["versions"]
    assert read_bins(tmp_path / "out") == reference(texts, "gpt2")


def test_without_gigatoken_tiktoken_encodes_and_says_so(vocabulary, monkeypatch, capsys):
    without_gigatoken(monkeypatch)
    assert encoding.Encoder("gpt2").name == "tiktoken"
    assert capsys.readouterr().out.startswith("gigatoken is not installed")


def test_every_file_has_checked_documents_and_they_are_few(tmp_path):
    texts = [random.Random(i).randbytes(2500).hex() for i in range(600)]
    write_shards(tmp_path, texts, 5)
    files = [sources.text_file(str(path), path.name) for path in sorted(tmp_path.glob("*.parquet"))]
    batches = list(encoding.with_checks(sources.batches(files, "text")))
    checked = [batch.file for batch in batches if batch.check is not None]
    assert set(checked) == set(range(5)) and len(checked) < 20


def test_a_missing_vocabulary_names_both_files_and_their_place(tmp_path):
    names = {
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    for name, cached in names.items():
        assert hashlib.sha1(f"{tokenizers.GPT2_VOCABULARY_URL}/{name}".encode()).hexdigest() == cached
    (tmp_path / "a.txt").write_text("a")
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "prepare_owt.py",
            "--source=files",
            f"--files={tmp_path}/a.txt",
            f"--out_dir={tmp_path}/out",
        ],
        env={**os.environ, **proxies, "TIKTOKEN_CACHE_DIR": str(tmp_path / "vocabulary")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert all(f"{name} as {cached}" in result.stderr for name, cached in names.items())
    assert str(tmp_path / "vocabulary") in result.stderr
    assert not (tmp_path / "out").exists()


# Going on


# Small pieces, and so slow that a kill comes in the middle.
KILLED = """
import time
import configurator, prepare_owt
from corpus import gathering, sources, token_file
sources.BATCH_BYTES, token_file.COMMIT_BYTES, gathering.MEMORY_BYTES = 2**13, 2**16, 0
gathering.WINDOW_BYTES, token_file.CHUNK_BYTES = 2**16, 2**14
append = token_file.TokenFile.append
token_file.TokenFile.append = lambda *arguments: (time.sleep(0.001), append(*arguments))
configurator.run(prepare_owt.main)
"""


@pytest.mark.slow
def test_killed_at_twenty_moments_it_ends_in_the_same_bins(tmp_path):
    texts = make_texts(12_000)
    pattern = write_shards(tmp_path / "in", texts)
    expected = reference(texts)
    out = tmp_path / "out"
    options = ["--source=files", f"--files={pattern}", "--tokenizer=bytes", "--val_fraction=0.05", f"--out_dir={out}"]
    rng, kills, places = random.Random(1), 0, set()
    while kills < 20 or not (out / "meta.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if kills < 20:
            if rng.random() < 0.8:  # while it encodes or gathers; else while it starts, too
                while line := process.stdout.readline():
                    if line.startswith("space:"):
                        break
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
        output = process.communicate()[0]
        if process.returncode == 0:
            assert read_bins(out) == expected
            if kills < 20:
                shutil.rmtree(out)  # and once more
        else:
            assert process.returncode == -signal.SIGKILL, output
            kills += 1
            if (out / "meta.json").exists():
                assert read_bins(out) == expected
            elif (out / "unfinished" / "state.json").exists():
                places.add(reached(out))
    assert read_bins(out) == expected
    assert len(places) > 5, "the kills came at different places"


def test_a_damaged_file_keeps_what_was_done_and_goes_on_when_replaced(tmp_path, refuses, command, monkeypatch):
    monkeypatch.setattr(token_file, "COMMIT_BYTES", 2**40)
    texts = make_texts(3000)
    call = arguments(write_shards(tmp_path / "in", texts, 5), tmp_path / "out")
    bad = tmp_path / "in" / "shard-1.parquet"
    good = bad.read_bytes()
    middle = len(good) // 2
    bad.write_bytes(good[:middle] + b"\xff" * 4000 + good[middle + 4000 :])  # its footer is sound
    refuses(*call, words=[bad, "to go on"])
    done = reached(tmp_path / "out")
    before, n = (pq.read_metadata(tmp_path / "in" / f"shard-{i}.parquet").num_rows for i in range(2))
    assert done > before, "a part of the damaged file, too"
    refuses(*call, words=[bad])
    assert reached(tmp_path / "out") == done
    texts[before : before + n] = reversed(texts[before : before + n])  # so that this part must not be kept
    pq.write_table(pa.table({"text": texts[before : before + n]}), bad)
    status, out, _ = command(*call)
    assert status == 0 and f"going on after {before:,} documents" in out
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


def test_a_prepared_folder_is_left_alone(tmp_path, capsys):
    pattern = write_shards(tmp_path / "in", make_texts(300))
    prepare(pattern, tmp_path / "out")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "unfinished").mkdir()  # as where a kill came after meta.json was written
    prepare(pattern, tmp_path / "out")
    assert "prepared already" in capsys.readouterr().out
    for change in ({"seed": 1}, {"val_fraction": 0.1}, {"text_column": "id"}):
        with pytest.raises(ValueError, match=f"prepared otherwise.*{next(iter(change))}"):
            prepare(pattern, tmp_path / "out", **change)
    write_shards(tmp_path / "in", ["other"], 1)
    with pytest.raises(ValueError, match=r"prepared otherwise.*other files"):
        prepare(pattern, tmp_path / "out")
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"without a meta\.json"):
        prepare(pattern, tmp_path / "out")


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    arguments = (tmp_path, {}, [], np.dtype("<u2"), 256)
    store = token_file.TokenFile(*arguments)
    with pytest.raises(ValueError, match="another preparation"):
        token_file.TokenFile(*arguments)
    store.close()
    token_file.TokenFile(*arguments).close()


def test_verify_tells_damaged_bins(tmp_path, refuses, command):
    out = tmp_path / "out"
    prepare(write_shards(tmp_path / "in", make_texts(300)), out)
    status, said, _ = command(main, "--verify", f"--out_dir={out}")
    assert status == 0 and said.count("as in meta.json") == 2
    content = bytearray((out / "train.bin").read_bytes())
    content[1000] ^= 1
    (out / "train.bin").write_bytes(content)
    refuses(main, "--verify", f"--out_dir={out}", words=[out / "train.bin", "damaged"])
    (out / "train.bin").unlink()
    refuses(main, "--verify", f"--out_dir={out}", words=[out / "train.bin", "missing"])
    refuses(main, "--verify", f"--out_dir={tmp_path}/nowhere", words=["no meta.json", "--out_dir"])


# Space


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
    with pytest.raises(ValueError, match=r"4\.0\d MB for twice the bins.*3\.90 MB are free"):
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
        refuses(*call, words=["no space is left", disk / "out", "to go on"])  # for the 0.8 MB of tokens
        assert 200 < reached(disk / "out") < 400
        filler.unlink()
        refuses(*call, words=["no space is left", disk / "out", "to go on"])  # for the bins
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
        refuses(*call, words=["no space is left", "File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert command(*call)[0] == 0
    assert read_bins(tmp_path / "out") == reference(texts)


# What is no text


BAD = {  # name of the file -> (how it is written, what the line says)
    "column.parquet": (lambda p: pq.write_table(pa.table({"body": ["a"]}), p), "no column 'text', only body"),
    "number.parquet": (lambda p: pq.write_table(pa.table({"text": [1]}), p), "of type int64, not text"),
    "bytes.parquet": (lambda p: pq.write_table(pa.table({"text": [b"a"]}), p), "of type binary, not text"),
    "null.parquet": (lambda p: pq.write_table(pa.table({"text": ["a"] * 9 + [None]}), p), "row 9 (from 0) is null"),
    "cut.parquet": (lambda p: p.write_bytes(b"PAR1 and no more"), "cannot be read"),
    "empty.parquet": (lambda p: p.write_bytes(b""), "cannot be read"),
    "field.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"body": "b"}\n'), "line 2 has no field 'text'"),
    "list.jsonl": (lambda p: p.write_text('["text"]\n'), "line 1 has no field 'text'"),
    "number.jsonl": (lambda p: p.write_text('{"text": "a"}\n\n{"text": 3}\n'), "line 3: text is int, not text"),
    "null.jsonl": (lambda p: p.write_text('{"text": null}\n'), "line 1: text is NoneType, not text"),
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--source=files", "--files=nothing/*.parquet"], "no file matches"),
        (["--source=files"], "go together"),
        (["--files=*.txt"], "go together"),
        (["--source=stdlib", "--revision=main"], "--revision is for a dataset on the hub"),
        (["--val_fraction=1"], "between 0 and 1"),
        (["--seed=-1"], "negative"),
        (["--tokenizer=gpt3"], "must be one of"),
        (["--source=files", "--files={}/one.txt", "--tokenizer=bytes"], "1 documents"),
        (["--source=files", "--files={}/one.txt", "--tokenizer=bytes", "--out_dir={}/one.txt"], "Not a directory"),
    ],
)
def test_mistakes_in_the_options_are_one_line(tmp_path, monkeypatch, refuses, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a")
    refuses(main, *(option.format(tmp_path) for option in options), words=[expected])


# The hub


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as it takes to serve the one dataset that lies in `root`."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"
    root: Path
    requests: list
    broken: str | None = None  # a file whose transfer breaks off

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, cut=False, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sizes = {"Content-Length": str(len(content)), "X-Repo-Commit": self.commit}
        for name, value in {**sizes, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def entry(self, path):
        name = str(path.relative_to(self.root))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        content = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def do_POST(self):
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer([self.entry(self.root / path) for path in paths])

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.requests.append((self.command, path))
        if path.startswith("/api/datasets/me/corpus/tree/"):
            folder = self.root / path.split("/tree/")[1].partition("/")[2]
            found = folder.rglob("*") if "recursive=true" in url.query.lower() else folder.iterdir()
            self.answer([self.entry(path) for path in sorted(found)])
        elif path.startswith("/api/datasets/me/corpus"):
            names = [str(path.relative_to(self.root)) for path in sorted(self.root.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            self.answer({"id": "me/corpus", "sha": self.commit, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith("/datasets/me/corpus/resolve/"):
            file = self.root / path.split("/resolve/")[1].partition("/")[2]
            if file.is_file():
                tag = self.entry(file)["oid"]
                self.answer(file.read_bytes(), cut=self.broken in path.split("/"), ETag=f'"{tag}"')
            else:
                self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer({}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


def test_a_dataset_on_the_hub_survives_interruption_and_loss_of_the_network(tmp_path):
    texts = make_texts(500)
    root = tmp_path / "hub"
    write_shards(root / "plain_text", texts, name="train-{}.parquet")
    config = "configs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n"
    (root / "README.md").write_text(f"---\n{config}---\n")
    handler = type("Handler", (FakeHub,), {"root": root, "requests": [], "broken": "train-1.parquet"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    out = tmp_path / "out"

    def run(*options):
        command = [sys.executable, ROOT / "prepare_owt.py", "--source=me/corpus", "--subset=plain_text"]
        command += [f"--out_dir={out}", "--tokenizer=bytes", "--val_fraction=0.05", *options]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        return result.returncode, result.stderr.splitlines()

    status, lines = run("--subset=other")
    assert status == 2 and len(lines) == 1 and "subset other" in lines[0]
    status, lines = run()
    assert status == 2 and len(lines) == 1 and "broke off" in lines[0] and "repeat the command" in lines[0]
    handler.broken, handler.requests[:] = None, []
    status, lines = run("--val_fraction=0.9999")  # downloads and encodes; then the split fails
    assert status == 2 and len(lines) == 1 and "each needs one or more" in lines[0]
    downloaded = [
        path.rpartition("/")[2] for command, path in handler.requests if command == "GET" and "resolve" in path
    ]
    assert "train-1.parquet" in downloaded and not {"train-0.parquet", "train-2.parquet"} & set(downloaded)
    server.shutdown()
    server.server_close()
    assert run() == (0, []), "all is downloaded, and no network is needed"
    assert read_bins(out) == reference(texts)
    manifest = data.read_manifest(out)
    assert manifest["source"]["revision"] == FakeHub.commit and manifest["source"]["id"] == "me/corpus"
    assert run() == (0, []), "nor to see that all is prepared"
    shutil.rmtree(out)
    environment["HF_HUB_OFFLINE"] = "1"  # else it tries for half a minute
    status, lines = run("--revision=main", "--source=me/other")
    assert status == 2 and len(lines) == 1 and "cannot find the files of me/other" in lines[0]


def test_the_counts_of_openwebtext_are_checked(tmp_path, capsys):
    cfg = PrepareConfig()
    assert (cfg.source, cfg.subset, cfg.revision) == prepare_owt.OPENWEBTEXT
    assert (cfg.tokenizer, cfg.val_fraction, cfg.seed, cfg.out_dir) == ("gpt2", 0.0005, 2357, "data/openwebtext")
    known = prepare_owt.OPENWEBTEXT_SPLITS
    for name, total in prepare_owt.OPENWEBTEXT_COUNTS.items():
        assert sum(known[split][name] for split in known) == total
    assert len(gathering.split(prepare_owt.OPENWEBTEXT_COUNTS["documents"], 0.0005, 2357)["val"]) == 4007
    manifest = {
        "source": {"id": cfg.source, "subset": cfg.subset, "revision": cfg.revision, "text_column": "text"},
        "split": {"seed": 2357, "val_fraction": 0.0005},
        "tokenizer": "gpt2",
        "splits": {name: dict(counts) for name, counts in known.items()},
    }
    prepare_owt.check_openwebtext("out", manifest)
    assert "known of this revision" in capsys.readouterr().out
    manifest["splits"]["val"]["tokens"] += 1
    with pytest.raises(ValueError, match="val: 4,434,607 tokens, not 4,434,606"):
        prepare_owt.check_openwebtext("out", manifest)
    manifest["source"]["revision"] = "another"
    prepare_owt.check_openwebtext("out", manifest)
