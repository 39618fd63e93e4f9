"""Our tokenizers in the tokenizers library: the same ids for every text, and the text back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import hf_tokenizers, tokenizers

pytest.importorskip("transformers")
CHARACTERS = ["\n", " ", "a", "b", "é", "字"]
TEXTS = st.lists(
    st.text() | st.sampled_from(["  ", "\r\n", "don't", "'ll", " 123", "<|endoftext|>", "é", "漢字", "👩‍🔬", "…"])
).map("".join)


@pytest.fixture(scope="module")
def pairs():
    """name -> (our tokenizer, that of transformers)."""
    ours = [tokenizers.get_tokenizer("bytes")]
    try:
        ours.append(tokenizers.get_tokenizer("gpt2"))
    except ValueError:  # it is not on this machine
        pytest.skip("GPT-2's vocabulary is not on this machine")
    return {each.name: (each, hf_tokenizers.fast_tokenizer(each, 32)) for each in ours}


@settings(max_examples=100)
@given(text=TEXTS)
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_every_text_has_the_same_ids(pairs, name, text):
    ours, theirs = pairs[name]
    ids = ours.encode(text, allowed_special="all")
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert len(theirs) == ours.n_vocab


def test_the_first_ranks_of_gpt2_are_a_tokenizer(pairs, tmp_path):
    ours = tokenizers.get_tokenizer("gpt2:4096")
    theirs = hf_tokenizers.fast_tokenizer(ours, 32)
    assert hf_tokenizers.same_ids(ours, theirs)
    assert not hf_tokenizers.same_ids(pairs["gpt2"][0], theirs)
    assert len(theirs) == 4097
    theirs.save_pretrained(tmp_path)
    assert hf_tokenizers.name_of(tmp_path, "gpt2:4096") == "gpt2:4096"


@given(text=st.text("".join(CHARACTERS)))
def test_characters(text):
    ours = tokenizers.get_tokenizer("characters", CHARACTERS)
    theirs = hf_tokenizers.fast_tokenizer(ours, 32)
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def test_a_folder_s_tokenizer_is_recognised_by_its_ids(pairs, tmp_path):
    for name, (_, theirs) in pairs.items():
        theirs.save_pretrained(tmp_path / name)
        assert hf_tokenizers.name_of(tmp_path / name) == name
    other = hf_tokenizers.fast_tokenizer(tokenizers.get_tokenizer("characters", CHARACTERS), 32)
    other.save_pretrained(tmp_path / "other")
    assert hf_tokenizers.name_of(tmp_path / "other") is None
    assert hf_tokenizers.name_of(tmp_path) is None
