"""The tokenizers, by their names in meta.json."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from corpus.kinds import first_line
from engine.files import read_json

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_VOCABULARY = {  # file -> its name in tiktoken's cache: the SHA-1 of its URL
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@dataclass(frozen=True)
class Characters:
    """The tokenizer of nanoGPT's character-level data, with what its callers use of a tiktoken Encoding."""

    characters: tuple[str, ...]  # in the order of their ids

    @cached_property
    def ids(self):
        """character -> its id."""
        return {character: number for number, character in enumerate(self.characters)}

    @property
    def n_vocab(self):
        """The number of characters."""
        return len(self.characters)

    @property
    def eot_token(self):
        """The id of the character after which a sample may begin: a line feed, or the first one where there is none."""
        return self.ids.get("\n", 0)

    def encode_ordinary(self, text):
        """The ids of a text's characters, a list. Raises ValueError for a character that the data does not have."""
        for character in text:
            if character not in self.ids:
                raise ValueError(
                    f"the text must consist of the {self.n_vocab} characters of the model's data, got {character!r}"
                )
        return [self.ids[character] for character in text]

    def encode(self, text, allowed_special=()):
        """As encode_ordinary: no character is special. allowed_special is that of tiktoken's Encoding."""
        return self.encode_ordinary(text)

    def decode(self, ids):
        """The text of ids."""
        return "".join(self.characters[number] for number in ids)


class FromFile:
    """The tokenizer of a tokenizer.json (the package tokenizers), with what its callers use of a tiktoken Encoding.

    Its end-of-text is the special token of ENDS that it has. Raises ValueError for a file that is none, or lacks one.
    """

    ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"the tokenizer {path} needs the package tokenizers: `pip install tokenizers`") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(Path(path).expanduser()))
        except Exception as error:  # of Rust, without a type of its own
            raise ValueError(f"{path} cannot be read as a tokenizer.json ({first_line(error)})") from error
        self.n_vocab = self._tokenizer.get_vocab_size(with_added_tokens=True)
        ends = [self._tokenizer.token_to_id(text) for text in self.ENDS]
        if not any(end is not None for end in ends):
            raise ValueError(f"{path} must have one of the tokens {', '.join(self.ENDS)}, which ends a document")
        self.eot_token = next(end for end in ends if end is not None)
        self._tokenizer.encode_special_tokens = True  # the text of a special token is ordinary text

    def encode_ordinary(self, text):
        """The ids of a text, a list; nothing in it is special."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        """As encode_ordinary, an array."""
        return np.array(self.encode_ordinary(text), np.uint32)

    def encode(self, text, allowed_special=()):
        """As encode_ordinary, but for the token that ends a document where allowed_special='all'."""
        end = self._tokenizer.id_to_token(self.eot_token)
        pieces = [self.encode_ordinary(piece) for piece in (text.split(end) if allowed_special == "all" else [text])]
        return [number for i, piece in enumerate(pieces) for number in ([self.eot_token] * bool(i) + piece)]

    def decode(self, ids):
        """The text of ids."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def token_bytes(tokenizer):
    """How many bytes of text each token of a tiktoken Encoding stands for, (n_vocab,) uint16; 0 for end-of-text.

    None for other tokenizers, whose tokens need not be pieces of the text.
    """
    if not hasattr(tokenizer, "_mergeable_ranks"):
        return None
    lengths = np.zeros(tokenizer.n_vocab, np.uint16)
    for token, number in tokenizer._mergeable_ranks.items():
        lengths[number] = len(token)
    return lengths


def get_tokenizer(name, characters=None):
    """The tiktoken Encoding with this name: 'gpt2', or 'bytes' (the 256 bytes and end-of-text, no download).

    'gpt2:4096' has the first 4,096 tokens of gpt2 and end-of-text: merges are ranked in the order in which they were
    learnt, so that any number of them is a tokenizer, too. The path of a tokenizer.json gives a FromFile. With
    'characters' the Characters of a list, which is in the manifest and the run.json of such data.
    Raises ValueError for another name, for characters that are no such list, and when GPT-2's vocabulary is not on this
    machine and cannot be downloaded.
    """
    if name.endswith(".json"):
        return FromFile(name)
    if name == "characters":
        if not (isinstance(characters, list) and characters and all(isinstance(each, str) for each in characters)):
            raise ValueError(
                "the tokenizer 'characters' needs the list of the data's characters, which the run.json of a run on "
                f"such data has as data.characters, got {characters!r}"
            )
        return Characters(tuple(characters))
    import tiktoken

    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"[\s\S]{1,64}",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    family, colon, size = name.partition(":")
    if family != "gpt2" or (colon and not (size.isascii() and size.isdecimal() and 256 <= int(size) < 50257)):
        raise ValueError(
            f"the tokenizer must be gpt2, gpt2:N with 256 to 50256 of its tokens, bytes, characters or the path of a "
            f"tokenizer.json, got {name!r}"
        )
    try:
        gpt2 = tiktoken.get_encoding(family)
        return _first_tokens(gpt2, int(size)) if colon else gpt2
    except Exception as error:  # of the network, of the disk, or tiktoken's own about a damaged file
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "a folder of your choice, named by TIKTOKEN_CACHE_DIR"
        files = " and ".join(f"{name} as {cached}" for name, cached in GPT2_VOCABULARY.items())
        raise ValueError(
            f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({first_line(error)}): put {files} "
            f"into {folder}; both are at {GPT2_VOCABULARY_URL}/"
        ) from error


def _first_tokens(encoding, n):
    """The tiktoken Encoding of the first n tokens of another, and end-of-text."""
    import tiktoken

    return tiktoken.Encoding(
        name=f"{encoding.name}:{n}",
        pat_str=encoding._pat_str,
        mergeable_ranks={token: rank for token, rank in encoding._mergeable_ranks.items() if rank < n},
        special_tokens={END_OF_TEXT: n},
    )


def tokenizer_of(path, name, vocab_size):
    """The tokenizer of a checkpoint file: the one called name, or with None that of run.json beside the file.

    Raises ValueError when neither is known, when they differ, and when it has more tokens than the model's vocab_size.
    """
    from engine import run_files  # which imports torch

    run_file = path.parent / run_files.FACTS
    data = (read_json(run_file) or {}).get("data")
    data = data if isinstance(data, dict) else {}
    recorded = data.get("tokenizer")
    if name is None and recorded is None:
        raise ValueError(f"no {run_file} names the tokenizer: name it with --tokenizer=gpt2 or --tokenizer=bytes")
    if None not in (name, recorded) and name != recorded:
        raise ValueError(f"tokenizer must be {recorded}, as {run_file} says, got {name}: leave out --tokenizer")
    tokenizer = get_tokenizer(name or recorded, data.get("characters"))
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(
            f"tokenizer must have at most {vocab_size} tokens, the vocab_size of {path}, got {name or recorded} with "
            f"{tokenizer.n_vocab}"
        )
    return tokenizer
