"""From the token file to the bins: its documents, split and put into the order of the split."""

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

MEMORY_BYTES = 2**29  # a token file up to this size is read whole
WINDOW_BYTES = 2**27  # of the bin of a larger one: the part that is put in order at a time


def split(n_documents, val_fraction, seed):
    """split -> the indices of its documents, in their order in the bin.

    The rule of `datasets.Dataset.train_test_split`, which nanoGPT uses. Raises ValueError when a split would be empty.
    """
    if not n_documents:
        raise ValueError("the source has no documents")
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(val_fraction * n_documents)
    if not 0 < n_val < n_documents:
        raise ValueError(
            f"val_fraction={val_fraction} of {n_documents:,} documents is {n_val:,} for validation, which leaves "
            f"{n_documents - n_val:,} for training: each needs one or more"
        )
    return {"train": order[n_val:], "val": order[:n_val]}


def split_by_position(n_tokens, val_fraction):
    """(ends, orders), as gather takes them, that cut a single document in two: its last val_fraction is for validation.

    Raises ValueError when it has too few tokens.
    """
    n_val = math.ceil(val_fraction * n_tokens)
    if not 0 < n_val < n_tokens:
        raise ValueError(
            f"the only document is too short to split (tokens with end-of-text: {n_tokens:,}, val_fraction="
            f"{val_fraction}): training and validation need one or more each"
        )
    return np.array([n_tokens - n_val, n_tokens]), {"train": np.array([0]), "val": np.array([1])}


def gather(path, ends, orders, folder, token_bytes, dtype, progress=lambda n: None):
    """Write the documents of a token file in another order: folder/<split>.bin for each of `orders`.

    ends: where the documents end in it, (documents,) int64, in tokens. orders: split -> the indices of its documents,
    in their order; each document is in exactly one. token_bytes: of text, for each token, (n_vocab,), or None where
    that is not known. progress: called with the number of bytes read or written, which add up to four times the size of
    the token file.
    Returns split -> {tokens, documents, bytes, sha256}. Raises OSError.

    No small pieces are read or written at random places: a bin is treated as a sequence of windows that fit into
    memory. The first pass reads the token file once, in order, and appends each document to the window to which it
    belongs; the second reads each window, puts its documents in order in memory, and writes it back. A token file that
    fits into memory needs no first pass.
    """
    lengths = np.diff(ends, prepend=0)
    is_small = os.path.getsize(path) <= MEMORY_BYTES
    window_bytes = token_file.CHUNK_BYTES if is_small else WINDOW_BYTES
    windows, window_of = _plan(lengths, orders, window_bytes // dtype.itemsize)
    sums, n_bytes = {split: hashlib.sha256() for split in orders}, dict.fromkeys(orders, 0)
    sync = getattr(os, "fdatasync", os.fsync)  # macOS and Windows have only fsync
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
            arrival = np.argsort(documents)  # the first pass kept the order of the token file
            arrived_ends = np.empty(len(documents), np.int64)
            arrived_ends[arrival] = np.cumsum(lengths[documents[arrival]])
            n_tokens, offset = int(lengths[documents].sum()), window.begin * dtype.itemsize
            arrived = np.fromfile(bins[window.split].name, dtype, n_tokens, offset=offset)
            return _pick(arrived, arrived_ends, lengths[documents])

        syncing = None
        for window, tokens in zip(windows, data.prefetch(in_order, windows), strict=True):
            hashed = hasher.submit(sums[window.split].update, tokens)
            bins[window.split].seek(window.begin * dtype.itemsize)
            bins[window.split].write(tokens)
            bins[window.split].flush()
            if syncing:
                syncing.result()  # raises what went wrong
            syncing = hasher.submit(sync, bins[window.split].fileno())  # else all is left for the end
            if token_bytes is not None:
                n_bytes[window.split] += int(token_bytes[tokens].sum(dtype=np.int64))
            hashed.result()
            progress(2 * tokens.nbytes)
        if syncing:
            syncing.result()
        for file in bins.values():
            file.flush()
            os.fsync(file.fileno())
    return {
        split: {
            "tokens": int(lengths[order].sum()),
            "documents": len(order),
            **({} if token_bytes is None else {"bytes": n_bytes[split]}),
            "sha256": sums[split].hexdigest(),
        }
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
