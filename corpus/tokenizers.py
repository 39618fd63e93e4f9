"""The tokenizers, by their names in meta.json."""

import os

from corpus.kinds import first_line

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_VOCABULARY = {  # file -> its name in tiktoken's cache: the SHA-1 of its URL
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def get_tokenizer(name):
    """The tiktoken Encoding with this name: 'gpt2', or 'bytes' (the 256 bytes and end-of-text, no download).

    Raises ValueError for another name, and when GPT-2's vocabulary is not on this machine and cannot be downloaded.
    """
    import tiktoken

    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"[\s\S]{1,64}",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name != "gpt2":
        raise ValueError(f"the tokenizer must be gpt2 or bytes, got {name!r}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # of the network, of the disk, or tiktoken's own about a damaged file
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "a folder of your choice, named by TIKTOKEN_CACHE_DIR"
        files = " and ".join(f"{name} as {cached}" for name, cached in GPT2_VOCABULARY.items())
        raise ValueError(
            f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({first_line(error)}): put {files} "
            f"into {folder}; both are at {GPT2_VOCABULARY_URL}/"
        ) from error
