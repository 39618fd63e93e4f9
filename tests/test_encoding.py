"""gigatoken is used only where it gives tiktoken's tokens, and nothing is encoded without the vocabulary."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
from text_files import (
    copy_vocabulary,
    make_texts,
    prepare,
    read_bins,
    reference,
    small_pieces,
    without_gigatoken,
    write_shards,
)

from configurator import ROOT
from corpus import encoding, reading, sources, tokenizers


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    copy_vocabulary(tmp_path / "vocabulary", monkeypatch)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    small_pieces(monkeypatch)


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
    batches = list(encoding.with_checks(reading.batches(files, "text")))
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
