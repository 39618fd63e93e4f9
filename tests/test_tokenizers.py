"""The tokenizer of nanoGPT's character-level data (those of tiktoken: test_data.py, test_encoding.py)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="must be gpt2, bytes or characters, got 'word'"):
        tokenizers.get_tokenizer("word")
