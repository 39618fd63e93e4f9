"""The tokenizer of nanoGPT's characters, and GPT-2's with fewer tokens (more: test_data.py, test_encoding.py)."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import prepare_owt
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
    with pytest.raises(ValueError, match=f"must be gpt2, gpt2:N with .*, bytes or characters, got '{name}'"):
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
