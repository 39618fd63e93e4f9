"""The documents of a token file in the order of the split: the bins."""

import contextlib
import hashlib
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from corpus import token_file

MEMORY_BYTES = 2**29  # a token file up to this size is gathered in memory
WINDOW_BYTES = 2**27  # else, of a bin that is sorted in memory at a time


def split(n_documents, val_fraction, seed):
    """Indices of the training and of the validation documents, in the order in which they stand in the bins.

    The rule of `datasets.Dataset.train_test_split`. Raises ValueError when one of the two would be empty.
    """
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(val_fraction * n_documents)
    if not 0 < n_val < n_documents:
        raise ValueError(
            f"{n_documents} documents with val_fraction={val_fraction} make {n_val} for validation and "
            f"{n_documents - n_val} for training; each needs one or more"
        )
    return {"train": order[n_val:], "val": order[:n_val]}


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
    window_bytes = token_file.CHUNK_BYTES if is_small else WINDOW_BYTES
    windows, window_of = _plan(lengths, orders, window_bytes // dtype.itemsize)
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
            last = np.searchsorted(ends, position + token_file.CHUNK_BYTES // dtype.itemsize, side="right")
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
