"""The tokenizer of nanoGPT's characters, and GPT-2's with fewer tokens (more: test_data.py, test_encoding.py)."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare_owt
import sample
import train
from corpus import tokenizers

CHARACTERS = ["\n", " ", "a", "b", "é", "字"]


@given(st.text("".join(CHARACTERS)))
def test_characters_are_their_numbers_in_the_list(text):
    tokenizer = tokenizers.get_tokenizer("characters", CHARACTERS)
    ids = tokenizer.encode_ordinary(text)
    assert ids == [CHARACTERS.index(character) for character in text] == tokenizer.encode(text, allowed_special="all")
    assert tokenizer.decode(ids) == text
    assert tokenizer.n_vocab == 6


def test_a_sample_without_a_prompt_begins_after_a_line_feed_where_there_is_one():
    assert tokenizers.get_tokenizer("characters", ["a", "\n"]).eot_token == 1
    assert tokenizers.get_tokenizer("characters", ["a", "b"]).eot_token == 0


def test_a_character_that_the_data_does_not_have_is_named():
    tokenizer = tokenizers.get_tokenizer("characters", CHARACTERS)
    with pytest.raises(ValueError, match="the 6 characters of the model's data, got 'x'"):
        tokenizer.encode("abx<|endoftext|>", allowed_special="all")


@pytest.mark.parametrize("characters", [None, [], "abc", [1, 2]])
def test_characters_need_their_list(characters):
    with pytest.raises(ValueError, match=r"needs the list of the data's characters, .* data\.characters, got"):
        tokenizers.get_tokenizer("characters", characters)


@pytest.mark.parametrize("name", ["word", "gpt2:", "gpt2:255", "gpt2:50257", "gpt2:١٠٠٠", "gpt2:1e3", "bytes:300"])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=f"must be gpt2, gpt2:N with .*, bytes, characters .*, got '{name}'"):
        tokenizers.get_tokenizer(name)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return tokenizers.get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("n", [256, 1000, 4096, 50256])
@settings(deadline=None)
@given(text=st.text() | st.text("abcdefghij \n\t'"))
def test_the_first_tokens_of_gpt2_are_a_tokenizer(gpt2, n, text):
    tokenizer = tokenizers.get_tokenizer(f"gpt2:{n}")
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert all(number < n for number in ids)
    assert len(ids) >= len(gpt2.encode_ordinary(text))
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (n + 1, n)
    lengths = tokenizers.token_bytes(tokenizer)
    assert lengths[ids].sum() == len(text.encode()) == tokenizers.token_bytes(gpt2)[gpt2.encode_ordinary(text)].sum()
    assert lengths[n] == 0


@pytest.mark.parametrize("name", ["bytes", "gpt2:1024", "gpt2"])
def test_a_preparation_counts_the_bytes_of_its_text(gpt2, name, tmp_path):
    texts = [f"Line {i}: naïve café {'字' * (i % 5)}\n" * (i + 1) for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    files = f"--files={tmp_path}/*.txt"
    out = tmp_path / "out"
    prepare_owt.main(["--source=files", files, f"--tokenizer={name}", f"--out_dir={out}", "--val_fraction=0.2"])
    manifest = data.read_manifest(out)
    counts = manifest["splits"].values()
    assert sum(count["bytes"] for count in counts) == sum(len(text.encode()) for text in texts)
    tokenizer, found = tokenizers.get_tokenizer(name), data.load_bins(tmp_path, "out")
    for split in data.SPLITS:
        tokens = getattr(found, split)
        text = tokenizer.decode([int(token) for token in tokens if token != manifest["eot"]])
        assert manifest["splits"][split]["bytes"] == len(text.encode())
    # A model that knows nothing needs log2(vocabulary) bits for each token.
    val = manifest["splits"]["val"]
    bits = data.bits_per_byte(math.log(manifest["vocab_size"]), manifest)
    assert bits == pytest.approx(math.log2(manifest["vocab_size"]) * val["tokens"] / val["bytes"])


@pytest.fixture
def tokenizer_file(tmp_path):
    """A small byte-level BPE of the package tokenizers, trained here."""
    tokenizers_package = pytest.importorskip("tokenizers")
    tokenizer = tokenizers_package.Tokenizer(tokenizers_package.models.BPE())
    tokenizer.pre_tokenizer = tokenizers_package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers_package.decoders.ByteLevel()
    trainer = tokenizers_package.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=tokenizers_package.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog too"] * 50, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_json_prepares_trains_and_samples(tokenizer_file, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizers.get_tokenizer(str(tokenizer_file))
    text = "the cat </s> naïve 字"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_token not in ids
    assert tokenizer.encode("a</s>b", allowed_special="all").count(tokenizer.eot_token) == 1

    texts = [f"the dog sat on mat {i}, and the cat too\n" * 9 for i in range(40)]
    for i, content in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(content)
    prepared = ["--source=files", "--files=*.txt", "--tokenizer=tokenizer.json", "--out_dir=data/mine"]
    assert command(prepare_owt.main, *prepared, "--val_fraction=0.2")[0] == 0
    bins = data.load_bins("data", "mine")
    first = bins.train[: list(bins.train).index(tokenizer.eot_token)]
    assert tokenizer.decode(first) in texts
    assert "bytes" not in bins.manifest["splits"]["val"]
    size = "--n_layer=1 --n_embd=16 --n_head=2 --block_size=16 --tokens_per_step=128 --batch_size=8".split()
    few = "--dataset=mine --max_iters=2 --warmup_iters=0 --eval_windows=4 --out_dir=out/run".split()
    assert command(train.main, *size, *few)[0] == 0
    status, out, error = command(sample.main, "--out_dir=out/run", "--start=the", "--max_new_tokens=5")
    assert status == 0, error
    assert "the" in out


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, tokenizer_file):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be read as a tokenizer\.json"):
        tokenizers.get_tokenizer(str(tmp_path / "other.json"))
    content = tokenizer_file.read_text().replace("</s>", "<x>")
    tokenizer_file.write_text(content)
    with pytest.raises(ValueError, match="must have one of the tokens"):
        tokenizers.get_tokenizer(str(tokenizer_file))
