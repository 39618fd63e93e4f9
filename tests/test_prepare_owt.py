"""The bins are those of the literal recipe; the command says what it made and how to train on it."""

import hashlib
import os
import platform
import random
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import (
    UNICODE,
    arguments,
    copy_vocabulary,
    make_texts,
    prepare,
    read_bins,
    reference,
    small_pieces,
    without_gigatoken,
    write_jsonl,
    write_shards,
)

import configurator
import data
import prepare_owt
from corpus import gathering, token_file, tokenizers
from prepare_owt import PrepareConfig, main
from train_config import TrainConfig


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    copy_vocabulary(tmp_path / "vocabulary", monkeypatch)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    small_pieces(monkeypatch)


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
    token_bytes = np.append(np.arange(256), 0).astype(np.uint16)  # a token t stands for t bytes
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
        splits = gathering.gather(folder / "tokens.bin", ends, orders, folder, token_bytes, dtype, done.append)
    for name, order in orders.items():
        expected = np.concatenate([documents[i] for i in order])
        assert (folder / f"{name}.bin").read_bytes() == expected.tobytes()
        assert splits[name]["tokens"] == len(expected)
        assert splits[name]["bytes"] == sum(int(documents[i][:-1].sum()) for i in order)
        assert splits[name]["sha256"] == hashlib.sha256(expected).hexdigest()
    assert sum(done) == 4 * (folder / "tokens.bin").stat().st_size


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the sums are those of Python 3.11.7's library")
def test_the_embedded_corpus_is_the_one_whose_results_are_known(tmp_path):
    manifest = prepare_owt.prepare(PrepareConfig(source="stdlib", out_dir=str(tmp_path)))
    sums = {name: manifest["splits"][name]["sha256"][:12] for name in ("train", "val")}
    assert sums == {"train": "e9aaac5830e2", "val": "190b6cbdad39"}
    assert manifest["split"] == {"seed": 2357, "val_fraction": 0.05} and manifest["tokenizer"] == "bytes"


# Sources and bins that changed


def test_a_prepared_folder_is_left_alone(tmp_path, capsys):
    pattern = write_shards(tmp_path / "in", make_texts(300))
    prepare(pattern, tmp_path / "out")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "unfinished").mkdir()  # as where a kill came after meta.json was written
    prepare(pattern, tmp_path / "out")
    assert "prepared already" in capsys.readouterr().out
    for change in ({"seed": 1}, {"val_fraction": 0.1}, {"text_column": "id"}):
        with pytest.raises(ValueError, match=f"with other settings.*{next(iter(change))}"):
            prepare(pattern, tmp_path / "out", **change)
    write_shards(tmp_path / "in", ["other"], 1)
    with pytest.raises(ValueError, match=r"with other settings.*other files"):
        prepare(pattern, tmp_path / "out")
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"without a meta\.json"):
        prepare(pattern, tmp_path / "out")


def put(path, content, mtime_ns=None):
    """Write content to path, with the time of modification of what was there before if asked for."""
    path.write_bytes(content)
    if mtime_ns:
        os.utime(path, ns=(mtime_ns, mtime_ns))


CHANGES = {  # what -> how the bytes of a file with a large middle change
    "the beginning": lambda content: b"X" + content[1:],
    "the end": lambda content: content[:-2] + b"X\n",
    "the size": lambda content: content + b"more\n",
    "the middle": lambda content: content[:200_000] + b"X" + content[200_001:],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_source_that_changed_is_not_prepared_already(tmp_path, what):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n" * 40_000)
    prepare(path, tmp_path / "out")
    content, mtime_ns = path.read_bytes(), path.stat().st_mtime_ns
    # The middle of a large file is not read: there the time of modification tells.
    put(path, CHANGES[what](content), None if what == "the middle" else mtime_ns)
    with pytest.raises(ValueError, match=r"other files: .*a\.txt has changed since"):
        prepare(path, tmp_path / "out")
    put(path, content, mtime_ns)
    prepare(path, tmp_path / "out")


def test_a_small_file_may_be_written_again_with_the_same_content(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n" * 5)
    prepare(path, tmp_path / "out")
    put(path, path.read_bytes(), 10**18)
    prepare(path, tmp_path / "out")
    assert "prepared already" in capsys.readouterr().out


def test_other_files_are_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 9)
    prepare(tmp_path / "*.txt", tmp_path / "out")
    (tmp_path / "c.txt").write_text("c")
    with pytest.raises(ValueError, match=r"c\.txt was not among them"):
        prepare(tmp_path / "*.txt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"b\.txt was among them"):
        prepare(tmp_path / "a.txt", tmp_path / "out")


def test_a_manifest_that_says_less_about_its_files_is_still_understood(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words")
    manifest = prepare(tmp_path / "a.txt", tmp_path / "out")
    for file in manifest["source"]["files"]:
        del file["ends_sha256"]
    data.write_manifest(tmp_path / "out", **manifest)
    prepare(tmp_path / "a.txt", tmp_path / "out")
    assert "prepared already" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["missing", "cut"])
def test_damaged_bins_are_not_prepared_already(tmp_path, spoil):
    (tmp_path / "a.txt").write_text("some words")
    prepare(tmp_path / "a.txt", tmp_path / "out")
    val = tmp_path / "out" / "val.bin"
    val.write_bytes(val.read_bytes()[:-2]) if spoil == "cut" else val.unlink()
    with pytest.raises(ValueError, match=r"val\.bin is (missing|damaged).*prepare it again"):
        prepare(tmp_path / "a.txt", tmp_path / "out")


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


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("count", ["documents", "tokens"])
def test_verify_compares_the_counts(tmp_path, refuses, split, count):
    manifest = prepare(write_shards(tmp_path / "in", make_texts(300)), tmp_path / "out")
    manifest["splits"][split][count] += 1
    data.write_manifest(tmp_path / "out", **manifest)
    refuses(main, "--verify", f"--out_dir={tmp_path}/out", words=[tmp_path / "out" / f"{split}.bin", "meta.json says"])


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--source=files", "--files=nothing/*.parquet"], "no file matches"),
        (["--source=files"], "go together"),
        (["--files=*.txt"], "go together"),
        (["--source=stdlib", "--revision=main"], "--revision is for a dataset on the hub"),
        (["--tokenizer=gpt3"], "must be gpt2, gpt2:N"),
        (["--source=files", "--files={}/empty.txt", "--tokenizer=bytes"], "the only document is too short"),
        (["--source=files", "--files={}/empty.jsonl", "--tokenizer=bytes"], "the source has no documents"),
        (["--source=files", "--files={}/one.txt", "--tokenizer=bytes", "--out_dir={}/one.txt"], "Not a directory"),
    ],
)
def test_mistakes_in_the_options_are_one_line(tmp_path, monkeypatch, refuses, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    refuses(main, *(option.format(tmp_path) for option in options), words=[expected])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "0", "1", "-0.1", "1.5", "2", "none.", "1/0"])
def test_val_fraction_is_greater_than_0_and_less_than_1(tmp_path, refuses, value):
    (tmp_path / "one.txt").write_text("a")
    refuses(
        *arguments(tmp_path / "one.txt", tmp_path / "out", f"--val_fraction={value}"), words=["val_fraction must be"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0, 1, -0.1, 2])
def test_the_range_of_val_fraction_is_checked_without_a_command_line_too(value):
    with pytest.raises(ValueError, match=f"val_fraction must be .* got {value}"):
        PrepareConfig(val_fraction=value)


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1", "2**64", "0.5", "1e30"])
def test_seed_is_a_whole_number_of_64_bits(tmp_path, refuses, value):
    (tmp_path / "one.txt").write_text("a")
    refuses(
        *arguments(tmp_path / "one.txt", tmp_path / "out", f"--seed={value}"), words=["seed must be a whole number"]
    )


def test_every_seed_of_64_bits_splits(tmp_path):
    for seed in (0, 2**64 - 1):
        assert PrepareConfig(seed=seed).seed == seed
        assert len(gathering.split(100, 0.05, seed)["val"]) == 5
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed must be .* got {seed}"):
            PrepareConfig(seed=seed)


def test_files_are_split_as_the_embedded_corpus_and_the_hub_as_nanogpt():
    fraction = {source: PrepareConfig(source=source).val_fraction for source in ("stdlib", "openwebtext", "me/corpus")}
    assert fraction == {"stdlib": 0.05, "openwebtext": 0.0005, "me/corpus": 0.0005}
    assert PrepareConfig(source="files", files="a.txt").val_fraction == 0.05


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text")
    status, out, _ = command(main, "--source=files", "--files=~/a.txt", "--tokenizer=bytes", "--out_dir=~/bins")
    assert status == 0 and (tmp_path / "bins" / "meta.json").exists()


# A single document


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("fraction", [0.0005, 0.05, 0.3])
@pytest.mark.parametrize("size", [5, 1000, 200_000])
def test_a_single_document_is_split_by_position(tmp_path, monkeypatch, command, size, fraction, memory):
    monkeypatch.setattr(gathering, "MEMORY_BYTES", memory)
    content = random.Random(size).randbytes(size // 2 + 1).hex()[:size].encode()
    (tmp_path / "one.txt").write_bytes(content)
    options = arguments(tmp_path / "one.txt", tmp_path / "out", f"--val_fraction={fraction}")
    status, said, _ = command(*options)
    assert status == 0 and "split by position" in said
    tokens = np.append(np.frombuffer(content, np.uint8).astype("<u2"), np.uint16(256))
    n_val = int(np.ceil(fraction * len(tokens)))
    assert read_bins(tmp_path / "out") == {"train": tokens[:-n_val].tobytes(), "val": tokens[-n_val:].tobytes()}
    manifest = data.read_manifest(tmp_path / "out")
    assert manifest["split"] == {"seed": 2357, "val_fraction": fraction, "by": "position"}
    assert manifest["splits"]["val"]["tokens"] == n_val
    assert len(data.load_bins(tmp_path, "out").train) == len(tokens) - n_val
    assert command(main, "--verify", f"--out_dir={tmp_path / 'out'}")[0] == 0
    status, said, _ = command(*options)
    assert status == 0 and "prepared already" in said


# What it says in the end


@pytest.mark.parametrize("n_tokens", [100, 3000, 300_000])
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("folder", ["data/mine", "elsewhere/with space", "{}/absolute/x", ".", "mine"])
def test_the_command_that_trains_reads_what_was_made(
    tmp_path, monkeypatch, request, tokenizer, folder, n_tokens, capsys
):
    if tokenizer == "gpt2":
        request.getfixturevalue("vocabulary")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_jsonl(tmp_path / "a.jsonl", ["some words " * (n_tokens // 200) for _ in range(100)])
    folder = folder.format(tmp_path)
    prepare(tmp_path / "a.jsonl", folder, tokenizer=tokenizer)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("train on it: python ")
    script, *arguments = shlex.split(said.partition("python ")[2])
    assert script == str(configurator.ROOT / "train.py")
    cfg = configurator.parse(TrainConfig, arguments)
    bins = data.load_bins(cfg.data_dir, cfg.dataset)
    assert bins.manifest == data.read_manifest(folder)
    assert cfg.wq_identity and cfg.vocab_size == {"bytes": 320, "gpt2": 50304}[tokenizer]
    assert len(bins.train) > cfg.block_size and len(data.evaluation_offsets(len(bins.val), cfg.block_size))


def test_the_embedded_corpus_and_openwebtext_have_their_documented_commands(monkeypatch):
    monkeypatch.chdir(configurator.ROOT)
    for dataset, n, vocabulary, expected in (
        ("stdlib", 10**6, 257, "python train.py config/quick.py config/reduced_tied.py"),
        ("openwebtext", 9 * 10**9, 50257, "python train.py config/reduced_tied.py"),
    ):
        manifest = {"vocab_size": vocabulary, "splits": {"train": {"tokens": n}, "val": {"tokens": n // 2000}}}
        assert prepare_owt.training_command(Path("data") / dataset, manifest) == expected


@pytest.mark.parametrize(
    ("n_documents", "size", "warns"), [(400, 6000, False), (400, 4000, True), (380, 6000, True), (20, 10, True)]
)
def test_a_small_validation_split_is_warned_of(tmp_path, capsys, n_documents, size, warns):
    write_jsonl(tmp_path / "a.jsonl", ["a" * size] * n_documents)
    prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert ("warning: the validation split is small" in capsys.readouterr().out) == warns
