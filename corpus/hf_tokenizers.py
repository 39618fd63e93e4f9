"""Our tokenizers as those of the transformers library, and which of ours one of its folders has."""

import itertools

from corpus import tokenizers
from corpus.tokenizers import END_OF_TEXT, Characters

MASK = "<|mask|>"
PROBES = (  # texts on which tokenizers differ if they differ at all
    "The quick brown fox doesn't jump  over\n\n\tthe lazy dog's 12345 tails; 3.14159!",
    "def f(x):\n    return [i**2 for i in range(10)]  # comment\r\n",
    "Ünïcödé: 漢字かな交じり文, Привет, שלום, 👩‍🔬🏳️‍🌈 a\u0301\u00a0\u2003x\ufeff",
    "    ",
    "'LL 'll's\u2019s ''",
)


def fast_tokenizer(tokenizer, max_length, with_mask=False):
    """A PreTrainedTokenizerFast with the ids of one of our tokenizers (`tokenizers.get_tokenizer`).

    max_length: in tokens, of the model. with_mask: a mask token after all the others, for an encoder.
    Whether it gives the same ids, `same_ids` says.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, Characters):
        backend, marks = _of_characters(tokenizer), {}
    else:
        # No text is unknown, but CTranslate2 asks for such a token, and GPT-2 has this one.
        backend, marks = _of_bytes(tokenizer), dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    if with_mask:
        marks["mask_token"] = MASK
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, clean_up_tokenization_spaces=False, **marks
    )


def _of_bytes(encoding):
    """A tiktoken Encoding on bytes, with GPT-2's way to split a text, in the tokenizers library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, ranks = bytes_to_unicode(), encoding._mergeable_ranks
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [tuple(text[part] for part in _parts(token, ranks)) for token in ranks if len(token) > 1]
    vocabulary = {text[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: encoding.eot_token}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return backend


def _parts(token, ranks):
    """The two tokens that are merged into a token: what byte-pair encoding makes of it with lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _of_characters(tokenizer):
    """The tokenizer of character-level data in the tokenizers library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(tokenizer.ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def same_ids(tokenizer, theirs):
    """Whether one of our tokenizers and one of transformers give the same ids, and the same texts back."""
    if isinstance(tokenizer, Characters):
        texts = ["".join(tokenizer.characters)]
    else:
        texts = [*PROBES, END_OF_TEXT, f"a{END_OF_TEXT}\nb"]
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="all")
        if theirs(text, add_special_tokens=False)["input_ids"] != ids or theirs.decode(ids) != text:
            return False
    return True


def name_of(folder, likely=None):
    """The name of our tokenizer with the ids of the one in a folder: likely, gpt2 or bytes; None: none of them."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # of many kinds, where files are missing or another program's
        return None
    for name in dict.fromkeys([*([likely] if isinstance(likely, str) else []), "bytes", "gpt2"]):
        try:
            tokenizer = tokenizers.get_tokenizer(name)
        except ValueError:  # there is none of that name, or GPT-2's vocabulary is not on this machine
            continue
        if len(theirs) >= tokenizer.n_vocab and same_ids(tokenizer, theirs):
            return name
    return None
