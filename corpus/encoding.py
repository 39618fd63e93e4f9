"""From text to token ids: by tiktoken, by gigatoken, which is checked against it, or by bytes.

Encoding runs in threads: pyarrow, tiktoken and gigatoken all release Python's global interpreter lock while they work,
and threads, unlike processes, share the vocabulary and return their results without a copy, so that memory stays small
on many cores.
"""

import base64
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np

import data
from corpus import reading, tokenizers

SAMPLE_RATIO = 1000  # of gigatoken's text, tiktoken encodes at least one byte in this many, too
HARD_TEXTS = (
    "",
    " ",
    tokenizers.END_OF_TEXT,
    f"a{tokenizers.END_OF_TEXT}{tokenizers.END_OF_TEXT} b<|endoftext|",
    "I'll, we've, they'RE, can't 'S ''d don''t 'ſ",
    "  two  spaces\n\n\n\ttabs \t \r\n end   \u3000\u00a0 ",
    "".join(map(chr, (*range(0x3400), *range(0xFB00, 0x10000), *range(0x1F300, 0x1F700)))),  # letters, digits, emoji
)


class DisagreementError(Exception):
    """gigatoken gave other tokens than tiktoken, or failed."""


class Encoder:
    """Encodes a Batch: the tokens of its documents, each followed by the end-of-text token. Thread-safe.

    tokenizer: a name for `tokenizers.get_tokenizer`. use_gigatoken: use it for gpt2 if it is installed and agrees with
    tiktoken. `name` is what encodes: 'gigatoken', 'tiktoken', 'tokenizers' or 'bytes'. Raises ValueError when the
    vocabulary is missing.
    """

    def __init__(self, tokenizer, use_gigatoken=True):
        self.tokenizer = tokenizers.get_tokenizer(tokenizer)
        self.vocab_size, self.eot = self.tokenizer.n_vocab, self.tokenizer.eot_token
        self.dtype = data.DTYPES[data.dtype_for(self.vocab_size)]
        self.name, self._encode = "bytes", _encode_bytes
        if isinstance(self.tokenizer, tokenizers.FromFile):
            self.name, self._encode = "tokenizers", self._encode_one_by_one
        elif tokenizer != "bytes":
            self.name, self._encode = "tiktoken", self._encode_one_by_one
            if use_gigatoken:
                self._try_gigatoken()

    def __call__(self, batch):
        """The tokens of a Batch, (tokens,) in the dtype of the bins, and how many each document has, (documents,).

        Raises ValueError for a row that is not text, DisagreementError when gigatoken and tiktoken differ.
        """
        texts = reading.valid_texts(batch)
        ids, offsets = self._encode(texts)
        if batch.check is not None and self.name == "gigatoken":
            expected, _ = self._encode_one_by_one(texts.slice(batch.check, 1))
            if not np.array_equal(ids[offsets[batch.check] : offsets[batch.check + 1]], expected):
                raise DisagreementError(f"{batch.path}, document {batch.first + batch.check:,}")
        return np.insert(ids.astype(self.dtype), offsets[1:], self.eot), np.diff(offsets) + 1

    def _encode_one_by_one(self, texts):
        # disallowed_special=(): the text <|endoftext|> in a document is ordinary text, as for encode_ordinary.
        documents = [self.tokenizer.encode_to_numpy(text, disallowed_special=()) for text in texts.to_pylist()]
        return np.concatenate(documents), np.cumsum([0, *map(len, documents)])

    def _try_gigatoken(self):
        try:
            import awkward
            import gigatoken

            with tempfile.NamedTemporaryFile(suffix=".tiktoken") as ranks:
                for token, rank in self.tokenizer._mergeable_ranks.items():
                    ranks.write(base64.b64encode(token) + b" %d\n" % rank)
                ranks.flush()
                fast = gigatoken.Tokenizer.from_tiktoken(ranks.name, pretokenizer="gpt2")

            def encode(texts):
                try:
                    batch = fast.encode_batch(awkward.from_arrow(texts), parallel=False)
                    return np.asarray(batch.layout.content.data), np.asarray(batch.layout.offsets.data)
                except BaseException as error:  # a panic of the Rust library is not an Exception
                    raise DisagreementError(f"it failed ({error})") from error

            hard = reading.string_array(HARD_TEXTS)
            if not all(map(np.array_equal, encode(hard), self._encode_one_by_one(hard))):
                raise DisagreementError("in the built-in check")
        except ImportError:
            print("gigatoken is not installed: encoding with tiktoken, many times slower (`pip install gigatoken`)")
        except Exception as error:
            print(f"gigatoken is not used ({type(error).__name__}: {error}): encoding with tiktoken")
        else:
            self.name, self._encode = "gigatoken", encode

    def versions(self):
        """The versions of the libraries that encode."""
        names = {"tokenizers"} if self.name == "tokenizers" else {self.name, "tiktoken"} - {"bytes"}
        return {name: metadata.version(name) for name in names}


def _encode_bytes(texts):
    _, offsets, content = texts.buffers()
    offsets = np.frombuffer(offsets, np.int64)
    return np.frombuffer(content, np.uint8)[: offsets[-1]][offsets[0] :], offsets - offsets[0]


def with_checks(batches):
    """The batches, with the documents marked that tiktoken encodes, too: some of every file with several documents."""
    seen, checked, last_file, count = 0, 0, -1, 0
    for batch in batches:
        seen += batch.texts.nbytes
        if (batch.file != last_file and len(batch.texts) > 1) or seen >= SAMPLE_RATIO * checked:
            index = count * 7919 % len(batch.texts)  # not always the first
            checked += batch.texts[index : index + 1].nbytes
            count += 1
            batch = reading.Batch(batch.file, batch.path, batch.first, batch.texts, check=index)
        last_file = batch.file
        yield batch


def encoded(batches, encoder, workers):
    """Yield (batch, tokens, lengths) in the order of batches, encoded ahead of time by `workers` threads.

    Raises what reading or encoding raised, after yielding everything that came before it.
    """
    pending, failure = deque(), None
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while failure is None and len(pending) < workers + 2:
                try:
                    batch = next(batches)
                    pending.append((batch, pool.submit(encoder, batch)))
                except Exception as error:
                    failure = error
            if not pending:
                break
            batch, future = pending.popleft()
            yield batch, *future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if not isinstance(failure, StopIteration):
        raise failure
