"""Text becomes token ids: the encoders, the token file that grows, and its gathering into the order of the split.

Threads do the encoding: pyarrow, tiktoken and gigatoken all leave Python's lock while they work, and threads, unlike
processes, share the vocabulary and hand over their results without a copy, so that memory stays small on many cores.
"""

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import corpus
import data

COMMIT_BYTES = 2**28  # of text between two commits of the token file
SAMPLE_RATIO = 1000  # at least one byte of text in this many is encoded twice, by gigatoken and by tiktoken
MEMORY_BYTES = 2**29  # a token file up to this size is gathered in memory
WINDOW_BYTES = 2**27  # else, of a bin that is sorted in memory at a time
CHUNK_BYTES = 2**25  # and of the token file that is read at a time
HARD_TEXTS = (
    "",
    " ",
    data.END_OF_TEXT,
    f"a{data.END_OF_TEXT}{data.END_OF_TEXT} b<|endoftext|",
    "I'll, we've, they'RE, can't 'S ''d don''t 'ſ",
    "  two  spaces\n\n\n\ttabs \t \r\n end   \u3000\u00a0 ",
    "".join(map(chr, (*range(0x3400), *range(0xFB00, 0x10000), *range(0x1F300, 0x1F700)))),  # letters, digits, emoji
)


class DisagreementError(Exception):
    """gigatoken gave other tokens than tiktoken, or broke down."""


class Encoder:
    """Batch → the tokens of its documents, each followed by the end-of-text token; may be called from many threads.

    tokenizer: 'gpt2' or 'bytes'. distrust: leave gigatoken alone. `name` says which library encodes: 'gigatoken',
    'tiktoken' or 'bytes'. Raises ValueError when the vocabulary is missing.
    """

    def __init__(self, tokenizer, distrust=False):
        self.tokenizer = data.get_tokenizer(tokenizer)
        self.vocab_size, self.eot = self.tokenizer.n_vocab, self.tokenizer.eot_token
        self.dtype = data.DTYPES[data.dtype_for(self.vocab_size)]
        self.name, self._encode = "bytes", _encode_bytes
        if tokenizer != "bytes":
            self.name, self._encode = "tiktoken", self._encode_tiktoken
            if not distrust:
                self._try_gigatoken()

    def __call__(self, batch):
        """The tokens of a Batch, (tokens,) in the dtype of the bins, and how many each document has, (documents,).

        Raises ValueError for a row that is not text, DisagreementError when gigatoken and tiktoken differ.
        """
        texts = corpus.valid_texts(batch)
        ids, offsets = self._encode(texts)
        if batch.check is not None and self.name == "gigatoken":
            expected, _ = self._encode_tiktoken(texts.slice(batch.check, 1))
            if not np.array_equal(ids[offsets[batch.check] : offsets[batch.check + 1]], expected):
                raise DisagreementError(f"{batch.path}, document {batch.first + batch.check:,}")
        return np.insert(ids.astype(self.dtype), offsets[1:], self.eot), np.diff(offsets) + 1

    def _encode_tiktoken(self, texts):
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
                    raise DisagreementError(f"it broke down ({error})") from error

            hard = corpus.string_array(HARD_TEXTS)
            if not all(map(np.array_equal, encode(hard), self._encode_tiktoken(hard))):
                raise DisagreementError("the texts of the built-in check")
        except ImportError:
            print("gigatoken is not installed: tiktoken encodes, many times slower (`pip install gigatoken`)")
        except Exception as error:
            print(f"gigatoken is left out, tiktoken encodes: {type(error).__name__}: {error}")
        else:
            self.name, self._encode = "gigatoken", encode

    def versions(self):
        """The versions of the libraries that encode."""
        return {name: metadata.version(name) for name in {self.name, "tiktoken"} - {"bytes"}}


def _encode_bytes(texts):
    _, offsets, content = texts.buffers()
    offsets = np.frombuffer(offsets, np.int64)
    return np.frombuffer(content, np.uint8)[: offsets[-1]][offsets[0] :], offsets - offsets[0]


def with_checks(batches):
    """The batches, with the documents marked that tiktoken encodes, too: some of every file, spread over it."""
    seen, checked, last_file, count = 0, 0, -1, 0
    for batch in batches:
        seen += batch.texts.nbytes
        if (batch.file != last_file and len(batch.texts) > 1) or seen >= SAMPLE_RATIO * checked:
            index = count * 7919 % len(batch.texts)  # not always the first
            checked += batch.texts[index : index + 1].nbytes
            count += 1
            batch = corpus.Batch(batch.file, batch.path, batch.first, batch.texts, check=index)
        last_file = batch.file
        yield batch


def encoded(batches, encoder, workers):
    """Yield (batch, tokens, lengths) in the order of batches, encoded by `workers` threads that work ahead.

    Raises what reading or encoding raised, after the results of everything that came before it.
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


class TokenFile:
    """The tokens of all documents in the order of the source, and how far they go.

    `tokens.bin` only grows; `state.json`, replaced whole at each commit, says how much of it is valid: the rest is cut
    off when a preparation goes on. Every document ends with the end-of-text token, to which no text is encoded, so the
    file itself says where documents end, and the disk holds nothing but the tokens.

    folder: where both files are. settings: what the tokens depend on, a dict of plain values. files: what is read, a
    list [name, bytes, time of change] each. dtype, eot: of the tokens. Raises ValueError when the folder holds the
    tokens of other settings or of other files, or when another process is at work in it.
    """

    def __init__(self, folder, settings, files, dtype, eot):
        self.path, self._state_path = Path(folder) / "tokens.bin", Path(folder) / "state.json"
        self._settings, self._files = settings, files
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._committer, self._committing = ThreadPoolExecutor(1), None
        try:
            self._begin()
            self._lock()
            if self._state_path.exists():
                self._go_on(json.loads(self._state_path.read_text(encoding="utf-8")))
            if self.path.stat().st_size < self.size:
                raise ValueError(f"{self.path} is shorter than it was: delete {folder} to start again")
            self._file.truncate(self.size)
            self._lengths = [document_lengths(self.path, dtype, eot, self.documents)]
        except BaseException:
            self.close()
            raise

    def _begin(self):
        self.file, self._file_start = 0, [0, 0, 0]  # the file in hand; documents, size and text_bytes before it
        self.documents = self.size = self.text_bytes = 0  # so far; size: of tokens.bin, in bytes
        self.distrust = False  # gigatoken has disagreed with tiktoken
        self._lengths = []
        self._uncommitted = 0

    def _lock(self):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another preparation is at work in {self.path.parent}: wait for it") from error

    def _go_on(self, state):
        folder = self.path.parent
        if state["settings"] != self._settings:
            raise ValueError(f"{folder} holds an unfinished preparation with other settings: delete it to start again")
        if state["digest"] != self._digest(state["file"]):
            raise ValueError(f"files that {folder} was made of have changed since: delete it to start again")
        self.file, self._file_start, self.distrust = state["file"], state["file_start"], state["distrust"]
        unchanged = state["file_in_hand"] == self._files[self.file : self.file + 1]
        self.documents, self.size, self.text_bytes = state["reached"] if unchanged else self._file_start

    @property
    def file_documents(self):
        """How many documents of the file in hand are done."""
        return self.documents - self._file_start[0]

    def document_ends(self):
        """Where each document ends, in tokens, the end-of-text token included: (documents,) int64."""
        return np.cumsum(np.concatenate(self._lengths))

    def append(self, batch, tokens, lengths):
        """Write the tokens of the next Batch; lengths: how many each document has."""
        if batch.file != self.file:
            self.file, self._file_start = batch.file, [self.documents, self.size, self.text_bytes]
        left = memoryview(tokens).cast("B")
        while left:
            left = left[self._file.write(left) :]
        self._lengths.append(lengths)
        self.documents += len(batch.texts)
        self.size += tokens.nbytes
        self.text_bytes += batch.texts.nbytes
        self._uncommitted += batch.texts.nbytes
        if self._uncommitted >= COMMIT_BYTES:
            self._commit()

    def commit(self):
        """Make what was appended survive the end of the process, or of the machine."""
        self._file.truncate(self.size)  # an append that failed may have left a part, on a disk that is full
        self._committing = None  # what went wrong before may go well now
        self._commit()
        self._committing.result()

    def _commit(self):
        """Begin to commit, in a thread, as the disk takes its time; raises what went wrong in the commit before."""
        if self._committing:
            self._committing.result()
        state = {
            "settings": self._settings,
            "digest": self._digest(self.file),
            "file": self.file,
            "file_in_hand": self._files[self.file : self.file + 1],
            "file_start": self._file_start,
            "reached": [self.documents, self.size, self.text_bytes],
            "distrust": self.distrust,
        }
        self._committing, self._uncommitted = self._committer.submit(self._write_state, state), 0

    def _write_state(self, state):
        os.fsync(self._file.fileno())
        data.write_json(self._state_path, state)

    def start_again(self):
        """Throw the tokens away: gigatoken made them, and it has disagreed with tiktoken."""
        self._begin()
        self.distrust = True
        self.commit()

    def close(self):
        """Let another process work in the folder."""
        self._committer.shutdown()
        self._file.close()

    def _digest(self, n_files):
        """Names the files that are done, whatever becomes of the others."""
        return hashlib.sha256(json.dumps([file[:2] for file in self._files[:n_files]]).encode()).hexdigest()


def document_lengths(path, dtype, eot, n_documents):
    """How many tokens each document of a token file has, the end-of-text token included: (n_documents,) int64."""
    ends, found, position = np.zeros(n_documents + 1, np.int64), 0, 0
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, CHUNK_BYTES // dtype.itemsize)):
            here = np.flatnonzero(chunk == eot)
            assert found + len(here) <= n_documents, "more ends of text than documents"
            ends[1 + found : 1 + found + len(here)] = here + (position + 1)
            found += len(here)
            position += len(chunk)
    assert found == n_documents and ends[-1] == position, "the token file does not end with a document"
    return np.diff(ends)


def gather(path, ends, orders, folder, dtype, progress=lambda n: None):
    """Write the documents of a token file in another order: folder/<split>.bin for each of `orders`.

    ends: where the documents end in it, (documents,) int64, in tokens. orders: split -> the indices of its documents,
    in their order; each document is in exactly one. progress: called with the bytes done; the whole is four times the
    size of the token file. Returns split -> {tokens, documents, sha256}.

    Nothing is read or written in small pieces at random: a bin is thought of as windows that fit into memory. The first
    pass reads the token file once, in order, and writes each document into its window, wherever the next free place is;
    the second reads each window, puts its documents in order in memory, and writes it back. A token file that fits into
    memory needs no first pass.
    """
    lengths = np.diff(ends, prepend=0)
    is_small = os.path.getsize(path) <= MEMORY_BYTES
    windows, window_of = _plan(lengths, orders, (CHUNK_BYTES if is_small else WINDOW_BYTES) // dtype.itemsize)
    sums = {split: hashlib.sha256() for split in orders}
    with contextlib.ExitStack() as stack:
        bins = {split: stack.enter_context(open(Path(folder) / f"{split}.bin", "wb+")) for split in orders}
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        if is_small:
            whole = np.fromfile(path, dtype)
            progress(2 * whole.nbytes)
        else:
            _scatter(path, ends, lengths, windows, window_of, bins, dtype, progress)

        def in_order(window):
            documents = orders[window.split][window.first : window.last]
            if is_small:
                return _pick(whole, ends[documents], lengths[documents])
            arrival = np.argsort(documents)  # the first pass wrote them as they stand in the token file
            arrived_ends = np.empty(len(documents), np.int64)
            arrived_ends[arrival] = np.cumsum(lengths[documents[arrival]])
            n_tokens, offset = int(lengths[documents].sum()), window.begin * dtype.itemsize
            arrived = np.fromfile(bins[window.split].name, dtype, n_tokens, offset=offset)
            return _pick(arrived, arrived_ends, lengths[documents])

        for window, tokens in zip(windows, data.prefetch(in_order, windows), strict=True):
            hashed = hasher.submit(sums[window.split].update, tokens)
            bins[window.split].seek(window.begin * dtype.itemsize)
            bins[window.split].write(tokens)
            bins[window.split].flush()
            hasher.submit(os.fdatasync, bins[window.split].fileno())  # else the disk has all to do at the end
            hashed.result()
            progress(2 * tokens.nbytes)
        for file in bins.values():
            file.flush()
            os.fsync(file.fileno())
    return {
        split: {"tokens": int(lengths[order].sum()), "documents": len(order), "sha256": sums[split].hexdigest()}
        for split, order in orders.items()
    }


@dataclass(frozen=True)
class Window:
    """A part of a bin: the documents that begin in it."""

    split: str
    begin: int  # its first token in the bin
    first: int  # its first place in the split's order
    last: int  # its last place + 1


def _plan(lengths, orders, window_tokens):
    """The Windows of the bins, about window_tokens long, and the window of each document, (documents,) uint32."""
    windows, window_of = [], np.empty(len(lengths), np.uint32)
    for split, order in orders.items():
        begins = np.cumsum(lengths[order]) - lengths[order]
        firsts = np.flatnonzero(np.diff(begins // window_tokens, prepend=-1))
        bounds = [*firsts.tolist(), len(order)]
        window_of[order] = np.repeat(np.arange(len(firsts)) + len(windows), np.diff(bounds))
        windows += [Window(split, int(begins[first]), first, last) for first, last in itertools.pairwise(bounds)]
    return windows, window_of


def _scatter(path, ends, lengths, windows, window_of, bins, dtype, progress):
    """Write each document of the token file into its window, in the order of the token file."""
    filled = [window.begin for window in windows]
    first = position = 0
    with open(path, "rb") as source:
        while first < len(ends):
            last = np.searchsorted(ends, position + CHUNK_BYTES // dtype.itemsize, side="right")
            last = max(first + 1, int(last))  # a document may be longer than a chunk
            chunk = np.fromfile(source, dtype, int(ends[last - 1]) - position)
            by_window = first + np.argsort(window_of[first:last], kind="stable")
            for documents in np.split(by_window, np.flatnonzero(np.diff(window_of[by_window])) + 1):
                number = window_of[documents[0]]
                block = _pick(chunk, ends[documents] - position, lengths[documents])
                file = bins[windows[number].split]
                file.seek(filled[number] * dtype.itemsize)
                file.write(block)
                filled[number] += len(block)
            progress(2 * chunk.nbytes)
            first, position = last, int(ends[last - 1])
    for file in bins.values():
        file.flush()


def _pick(tokens, ends, lengths):
    """The pieces of tokens that end at `ends`, one after the other."""
    return np.concatenate([tokens[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)])
