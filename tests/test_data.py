import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_dataset
from hypothesis import given
from hypothesis import strategies as st

import data
from corpus import tokenizers

SEEDS = st.integers(0, 2**32)


@given(data_seed=SEEDS, step=st.integers(0, 10**6), block_size=st.integers(1, 64), n=st.integers(1, 40))
def test_the_batch_of_a_step_is_a_pure_function(data_seed, step, block_size, n):
    offsets = data.batch_offsets(1000, block_size, n, data_seed, step)
    np.random.rand(3)
    torch.rand(3)
    assert np.array_equal(offsets, data.batch_offsets(1000, block_size, n, data_seed, step))
    assert 0 <= offsets.min() and offsets.max() + block_size + 1 <= 1000
    other = data.batch_offsets(10**9, block_size, n, data_seed, step + 1)
    assert not np.array_equal(other, data.batch_offsets(10**9, block_size, n, data_seed, step))
    assert not np.array_equal(other, data.batch_offsets(10**9, block_size, n, data_seed + 1, step + 1))


def test_offsets_are_uniform_and_reach_both_ends():
    offsets = np.concatenate([data.batch_offsets(108, 8, 50, 1, step) for step in range(2000)])
    counts = np.bincount(offsets, minlength=100)
    assert len(counts) == 100
    assert counts.min() > 0.8 * 1000 and counts.max() < 1.2 * 1000


def test_another_machine_draws_the_same_offsets():
    # Values of numpy's Philox stream, which its compatibility policy keeps; a change would change every run.
    assert data.batch_offsets(10**6, 128, 4, 1337, 5).tolist() == [859574, 908189, 526520, 303888]


@given(n_tokens=st.integers(2, 5000), block_size=st.integers(1, 70), n_windows=st.integers(1, 90))
def test_evaluation_windows_do_not_overlap_and_spread_over_the_split(n_tokens, block_size, n_windows):
    if n_tokens <= block_size:
        with pytest.raises(ValueError, match="block_size"):
            data.evaluation_offsets(n_tokens, block_size)
        return
    every = data.evaluation_offsets(n_tokens, block_size)
    assert len(every) == (n_tokens - 1) // block_size
    assert np.array_equal(every, np.arange(len(every)) * block_size)
    some = data.evaluation_offsets(n_tokens, block_size, n_windows)
    assert len(some) == min(n_windows, len(every))
    assert set(some) <= set(every)
    gaps = np.diff(some)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= block_size


@given(block_size=st.integers(1, 20), offsets=st.lists(st.integers(0, 70), min_size=1, max_size=5))
def test_targets_are_the_inputs_one_token_on(block_size, offsets):
    tokens = np.arange(100, dtype="<u2") * 600  # beyond int16: an unsigned id must stay one
    x, y = data.windows(tokens, np.array(offsets), block_size)
    assert x.shape == y.shape == (len(offsets), block_size)
    assert x.dtype == y.dtype == torch.int64
    for row, offset in enumerate(offsets):
        assert x[row].tolist() == [600 * (offset + i) for i in range(block_size)]
        assert y[row].tolist() == [600 * (offset + 1 + i) for i in range(block_size)]


def test_prefetching_keeps_the_order_and_passes_errors_on():
    assert list(data.prefetch(lambda key: key * key, range(7))) == [key * key for key in range(7)]
    assert list(data.prefetch(str, [])) == []
    made = []
    batches = data.prefetch(lambda key: made.append(key) or key, itertools.count())
    assert next(batches) == 0
    batches.close()
    assert max(made) <= 2
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda key: 1 / key, [1, 0]))


def test_the_fingerprint_names_the_tokens(tmp_path):
    for name, seed, manifest in (("a", 0, True), ("b", 0, True), ("c", 1, True), ("d", 0, False), ("e", 1, False)):
        write_dataset(tmp_path / name, seed=seed, manifest=manifest)
    a, b, c, d, e = (data.load_bins(tmp_path, name).fingerprint for name in "abcde")
    assert a == b
    assert len({a, c, d, e}) == 4


def test_bins_of_nanogpt_are_taken_for_gpt_2_tokens_and_it_is_said(tmp_path, capsys):
    write_dataset(tmp_path / "bare", manifest=False)
    bins = data.load_bins(tmp_path, "bare")
    assert (bins.manifest["tokenizer"], bins.manifest["vocab_size"]) == ("gpt2", 50257)
    assert capsys.readouterr().out.count("\n") == 1


def spoil_truncate(folder):
    with open(folder / "train.bin", "r+b") as file:
        file.truncate(1001)


def spoil_manifest(**changes):
    def spoil(folder):
        path = folder / "meta.json"
        manifest = json.loads(path.read_text())
        for name, value in changes.items():
            manifest[name] = value
            if value is None:
                del manifest[name]
        path.write_text(json.dumps(manifest))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "val.bin").unlink(), ["val.bin", "python prepare_owt.py"]),
        (spoil_truncate, ["train.bin", "1,001 bytes", "8,000"]),
        (spoil_manifest(dtype="uint32"), ["train.bin", "16,000"]),
        (spoil_manifest(dtype="float32"), ["meta.json", "float32"]),
        (spoil_manifest(format=99), ["meta.json", "format"]),
        (spoil_manifest(splits=None), ["meta.json", "splits"]),
        (spoil_manifest(splits={"train": {"tokens": 5}}), ["meta.json", "val"]),
        (lambda folder: (folder / "meta.json").write_text("{"), ["meta.json", "JSON"]),
    ],
)
def test_damaged_data_is_refused(tmp_path, spoil, words):
    write_dataset(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(ValueError) as refusal:
        data.load_bins(tmp_path, "set")
    assert all(word in str(refusal.value) for word in words), refusal.value


@given(st.text())
def test_the_byte_tokenizer_is_utf_8(text):
    tokenizer = tokenizers.get_tokenizer("bytes")
    tokens = tokenizer.encode_ordinary(text)
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (256, 257)


# nanoGPT's folders


def write_characters(folder, text, **changes):
    """Bins and meta.pkl as nanoGPT's character-level recipe writes them."""
    characters = sorted(set(text))
    ids = np.array([characters.index(character) for character in text], np.uint16)
    folder.mkdir(parents=True)
    ids[:-400].tofile(folder / "train.bin")
    ids[-400:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    meta["stoi"] = {character: i for i, character in enumerate(characters)}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta | changes))
    return characters


def test_character_level_data_is_understood(tmp_path, capsys):
    characters = write_characters(tmp_path / "chars", "to be, or not to be: é\n" * 100)
    bins = data.load_bins(tmp_path, "chars")
    assert bins.manifest["characters"] == characters
    assert (bins.manifest["tokenizer"], bins.manifest["vocab_size"]) == ("characters", len(characters))
    assert "characters" in capsys.readouterr().out


class Evil:
    """Pickled, it asks for a call."""

    def __reduce__(self):
        return (open, ("unpickled", "w"))


@pytest.mark.parametrize(
    "changes",
    [dict(itos=Evil()), dict(itos={0: 1}), dict(vocab_size="x"), dict(vocab_size=3), dict(itos=None)],
    ids=["a call", "numbers", "size", "fewer", "none"],
)
def test_another_meta_pkl_is_refused_and_executes_nothing(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    write_characters(tmp_path / "chars", "to be, or not to be\n" * 100, **changes)
    with pytest.raises(ValueError, match=r"meta\.pkl is not nanoGPT's meta\.pkl of characters"):
        data.load_bins(tmp_path, "chars")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    "ids", [np.full(5000, 60_000, np.uint16), np.arange(5000, dtype=np.uint32)], ids=["beyond GPT-2", "uint32"]
)
def test_bare_bins_that_cannot_be_gpt2_tokens_are_refused(tmp_path, ids):
    (tmp_path / "bare").mkdir()
    for name in ("train", "val"):
        ids.tofile(tmp_path / "bare" / f"{name}.bin")
    with pytest.raises(
        ValueError, match=r"train\.bin: there is a token \d+, and vocab_size is 50257: the bins are damaged"
    ):
        data.load_bins(tmp_path, "bare")


def test_a_token_beyond_the_vocabulary_is_named_before_the_step(tmp_path):
    tokens = np.zeros(100, np.uint16)
    tokens[50] = 64
    data.windows(tokens, [0], 40, vocab_size=64)
    with pytest.raises(ValueError, match="there is a token 64, and vocab_size is 64"):
        data.windows(tokens, [0, 30], 40, vocab_size=64)
