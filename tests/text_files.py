"""Texts for the tests of corpus/ and prepare_owt.py, the files that hold them, and the bins that they should become."""

import gzip
import json
import os
import random
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_owt
from corpus import gathering, reading, sources, token_file, tokenizers
from prepare_owt import PrepareConfig, main

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


def copy_vocabulary(folder, monkeypatch):
    """Copy GPT-2's vocabulary, as tiktoken deletes files that it finds damaged; skips the test where there is none."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not all((Path(cache) / name).is_file() for name in tokenizers.GPT2_VOCABULARY.values()):
        pytest.skip("TIKTOKEN_CACHE_DIR does not name a folder with GPT-2's vocabulary")
    folder.mkdir()
    for name in tokenizers.GPT2_VOCABULARY.values():
        shutil.copyfile(Path(cache) / name, folder / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def small_pieces(monkeypatch):
    """Several batches, windows and commits, although the corpora of the tests are small."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 2**14)
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


def read_texts(path, column="text", skip=0):
    """The documents of one file after the first `skip`."""
    file = sources.text_file(str(path), path.name)
    return [text for batch in reading.batches([file], column, 0, skip) for text in batch.texts.to_pylist()]
