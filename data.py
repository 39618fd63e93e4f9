"""Token bins, the batch of a step and the evaluation windows.

A dataset is a folder with `train.bin`, `val.bin` (raw little-endian token ids, each document followed by the
end-of-text token: nanoGPT's format) and `meta.json`, the manifest that says what they are. The batch of a step is a
pure function of (data_seed, step), so a resumed run needs no loader state, and neither the micro-batch nor the number
of processes changes what a run reads.
"""

import hashlib
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.files import read_json, sha256_of, write_atomically, write_json

MANIFEST_VERSION = 1
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
GPT2_MANIFEST = {"tokenizer": "gpt2", "vocab_size": 50257, "eot": 50256, "dtype": "uint16"}


@dataclass(frozen=True)
class TokenBins:
    """The two splits of a dataset, memory-mapped, with their manifest."""

    train: np.ndarray  # (tokens,) uint16 or uint32
    val: np.ndarray
    manifest: dict
    fingerprint: str  # names the data: equal fingerprints, equal tokens


def with_vocabulary(values, defaults):
    """values, name -> value of TrainConfig's fields, with the vocab_size of their data where they have none.

    defaults: the class TrainConfig (preparing data imports this module, and no torch). The vocabulary is the data's
    tokens, and a mask for objective=mlm, padded to a multiple of 64, which is faster. Unchanged where there is no data
    yet.
    """
    folder = Path(values.get("data_dir", defaults.data_dir)) / values.get("dataset", defaults.dataset)
    if "vocab_size" in values or not (folder / "train.bin").is_file():
        return values
    needed = manifest_of(folder, say=lambda text: None)["vocab_size"] + (values.get("objective") == "mlm")
    return {**values, "vocab_size": 64 * math.ceil(needed / 64)}


def check_vocabulary(bins, cfg):
    """Raise ValueError unless the model of a TrainConfig has an embedding for every token of TokenBins."""
    needed = bins.manifest["vocab_size"] + (cfg.objective == "mlm")  # one more for the mask token
    if needed > cfg.vocab_size:
        raise ValueError(
            f"{cfg.data_dir}/{cfg.dataset} needs vocab_size={needed} or more for objective={cfg.objective}, and "
            f"the model has vocab_size={cfg.vocab_size}"
        )

    for split, tokens in (("train", bins.train), ("val", bins.val)):
        largest = sample(tokens).max()
        if largest >= cfg.vocab_size:
            raise ValueError(f"{cfg.data_dir}/{cfg.dataset}/{split}.bin: {_foreign_token(largest, cfg.vocab_size)}")


def sample(tokens):
    """Some of the tokens of a split, which stand for all: 64 pieces of at most 1,024, spread over it; (n,)."""
    starts = np.arange(64) * max(0, len(tokens) - 1024) // 63
    return np.concatenate([tokens[start : start + 1024] for start in starts])


def _foreign_token(token, vocab_size):
    return ValueError(
        f"there is a token {token}, and vocab_size is {vocab_size}: the bins are damaged, of another tokenizer, or of "
        "another number format (uint32 in place of uint16)"
    )


def bits_per_byte(loss, manifest, split="val"):
    """A loss in nats per token of a split as bits per byte of its text, which compares across tokenizers.

    None where the manifest does not say how many bytes the split has: bare bins, or one from before it did.
    """
    counts = manifest.get("splits", {}).get(split, {})
    n_bytes = counts.get("bytes")
    return loss / math.log(2) * counts["tokens"] / n_bytes if n_bytes else None


def dtype_for(vocab_size):
    """The name of the smallest bin dtype that holds the ids below vocab_size."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def load_bins(data_dir, dataset, say=print):
    """The bins in data_dir/dataset; say: told where they have no meta.json.

    Raises ValueError when they are missing, cut short, or not what meta.json says.
    """
    folder = Path(data_dir) / dataset
    paths = {split: folder / f"{split}.bin" for split in SPLITS}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise ValueError(f"no token bins: {' and '.join(missing)} not found; {_how_to_prepare(folder)}")
    manifest = manifest_of(folder, say)
    dtype = DTYPES[manifest["dtype"]]
    tokens = {}
    for split, path in paths.items():
        size = path.stat().st_size
        expected = manifest["splits"][split]["tokens"] * dtype.itemsize if "splits" in manifest else size
        if size != expected or size % dtype.itemsize or not size:
            raise ValueError(
                f"{path} has {size:,} bytes, not the {expected:,} of its manifest: it is damaged or was written by "
                "something else; delete the folder and prepare the data again"
                if size != expected
                else f"{path} has {size:,} bytes, which is not a whole number of {manifest['dtype']} tokens"
            )
        tokens[split] = np.memmap(path, dtype=dtype, mode="r")
        if "splits" not in manifest:
            largest = sample(tokens[split]).max()
            is_uint32 = not tokens[split][1:4096:2].any()  # whose upper halves are zero
            if largest >= manifest["vocab_size"] or is_uint32:
                raise ValueError(f"{path}: {_foreign_token(largest, manifest['vocab_size'])}")
    return TokenBins(**tokens, manifest=manifest, fingerprint=_fingerprint(tokens, manifest))


def manifest_of(folder, say):
    """The manifest of a dataset's folder, or what stands for one in folders of nanoGPT's, which say is told."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    if (folder / "meta.pkl").exists():
        manifest = character_manifest(folder / "meta.pkl")
        say(f"{folder} has nanoGPT's meta.pkl: its tokens are {manifest['vocab_size']} characters")
        return manifest
    say(f"{folder} has no meta.json: its bins are taken for GPT-2 tokens, as nanoGPT writes them")
    return GPT2_MANIFEST


def _how_to_prepare(folder):
    """What to do where a dataset's folder has no bins."""
    commands = {
        "openwebtext": "prepare OpenWebText with `python prepare_owt.py` (24 GB to download), or begin with the small "
        "embedded corpus: "
        "`python prepare_owt.py --source=stdlib && python train.py config/quick.py config/reduced_tied.py`",
        "stdlib": "prepare the embedded corpus with `python prepare_owt.py --source=stdlib` (seconds)",
    }
    there = sorted(path.parent.name for path in folder.parent.glob("*/train.bin"))
    if folder.name in commands:
        return commands[folder.name]
    datasets = f"the datasets in {folder.parent} are {', '.join(there)}" if there else f"{folder.parent} has no dataset"
    return f"{datasets}; own texts: `python prepare_owt.py --source=files --files=… --out_dir={folder}`"


def read_manifest(folder):
    """The content of folder/meta.json, or None where there is none. Raises ValueError for one that is not ours."""
    path = Path(folder) / "meta.json"
    manifest = read_json(path)
    return None if manifest is None else check_manifest(manifest, path)


def check_manifest(manifest, path):
    """manifest, the dict in a meta.json at path. Raises ValueError for one that is not ours."""
    if manifest.get("format") != MANIFEST_VERSION:
        raise ValueError(f"{path} is not a manifest of format {MANIFEST_VERSION}; prepare the data again")
    try:
        counts = [manifest["splits"][split]["tokens"] for split in SPLITS]
        complete = DTYPES[manifest["dtype"]] and manifest["tokenizer"] and manifest["vocab_size"] + sum(counts)
        [manifest["splits"][split]["sha256"] for split in SPLITS]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a valid entry: {error}; prepare the data again") from error
    assert complete
    return manifest


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, text and numbers, and executes nothing: a pickle may name any function to call."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def character_manifest(path):
    """The manifest that nanoGPT's meta.pkl of character-level data stands for.

    Its `characters` are a list in the order of their ids. Raises ValueError for another content, executing nothing.
    """
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        itos = content["itos"]
        characters = [itos[i] for i in range(content["vocab_size"])]
        if not all(isinstance(character, str) for character in characters) or len(itos) != len(characters):
            raise TypeError("itos is not a dict from ids to characters")
    except Exception as error:  # pickle raises whatever a damaged file leads to
        raise ValueError(
            f"{path} is not nanoGPT's meta.pkl of characters ({type(error).__name__}: {error}); prepare the data again"
        ) from error
    return {"tokenizer": "characters", "vocab_size": len(characters), "dtype": "uint16", "characters": characters}


def write_manifest(folder, **entries):
    """Write folder/meta.json, whole or not at all; returns its content."""
    manifest = {"format": MANIFEST_VERSION, **entries}
    write_json(Path(folder) / "meta.json", manifest)
    return manifest


def write_random_bins(folder, n_train, n_val, vocab_size):
    """Write token bins of uniformly random tokens: what a benchmark, or a trial of the code, needs of data."""
    dtype, rng, splits = dtype_for(vocab_size), np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train", n_train), ("val", n_val)):
        content = rng.integers(0, vocab_size, tokens).astype(DTYPES[dtype])
        write_atomically(folder / f"{name}.bin", lambda file: file.write(content))  # noqa: B023
        splits[name] = {"tokens": tokens, "documents": 1, "sha256": sha256_of(folder / f"{name}.bin")}
    write_manifest(folder, tokenizer="random", vocab_size=vocab_size, eot=0, dtype=dtype, splits=splits)


def batch_offsets(n_tokens, block_size, n_sequences, data_seed, step):
    """Where the sequences of one step's global batch begin: (n_sequences,) int64, a pure function of its arguments.

    Uniform over n_tokens − block_size, from a Philox generator keyed by (data_seed, step). Raises ValueError when the
    data is not longer than one block.
    """
    if n_tokens <= block_size:
        raise ValueError(f"the training split has {n_tokens:,} tokens; block_size={block_size} needs at least one more")
    generator = np.random.Generator(np.random.Philox(key=_key(data_seed, step)))
    return generator.integers(0, n_tokens - block_size, size=n_sequences)


def evaluation_offsets(n_tokens, block_size, n_windows=None):
    """Where the non-overlapping windows of an evaluation begin: all, or n_windows evenly spaced ones; (n,) int64.

    Raises ValueError when the split does not hold one window.
    """
    available = (n_tokens - 1) // block_size
    if available < 1:
        raise ValueError(f"the validation split has {n_tokens:,} tokens; block_size={block_size} needs one more")
    n = min(n_windows or available, available)
    return np.arange(n) * available // n * block_size


def windows(tokens, offsets, block_size, vocab_size=None):
    """Inputs and targets of the sequences at offsets: two int64 tensors, (len(offsets), block_size).

    Raises ValueError for a token that is not below vocab_size, which a GPU would only meet in the middle of a step.
    """
    import torch  # here, so that preparing data does not wait for it

    sequences = np.stack([tokens[offset : offset + block_size + 1] for offset in offsets]).astype(np.int64)
    if vocab_size is not None and sequences.max() >= vocab_size:
        raise _foreign_token(sequences.max(), vocab_size)
    sequences = torch.from_numpy(sequences)
    return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


def mask_tokens(x, vocab_size, data_seed, numbers):
    """Inputs and targets of masked language modelling (BERT): two int64 tensors of x's shape (n, block_size).

    In each sequence 15 % of the positions, the same number in each, are to be predicted; the others' targets are −1.
    Of these 80 % read the mask token, whose id is vocab_size (in the padded part of the model's), 10 % a random token
    and 10 % their own. A pure function: numbers, (n,), name the sequences among those of data_seed.
    """
    import torch

    inputs, targets = x.numpy().copy(), np.full(x.shape, -1)
    n_masked = max(1, round(0.15 * x.shape[1]))
    for row, number in enumerate(numbers):
        # The counter sets this stream apart from that of batch_offsets.
        generator = np.random.Generator(np.random.Philox(key=_key(data_seed, number), counter=[0, 0, 0, 1]))
        positions = generator.permutation(x.shape[1])[:n_masked]
        kind, random_tokens = generator.random(n_masked), generator.integers(0, vocab_size, n_masked)
        targets[row, positions] = inputs[row, positions]
        own = inputs[row, positions]
        inputs[row, positions] = np.where(kind < 0.8, vocab_size, np.where(kind < 0.9, random_tokens, own))
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def prefetch(make, keys):
    """Yield make(key) for each key, each made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for key in keys:
            following = pool.submit(make, key)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _key(data_seed, number):
    return np.array([data_seed, number], dtype=np.uint64)


def _fingerprint(tokens, manifest):
    if "splits" in manifest:
        sums = [manifest["splits"][split]["sha256"] for split in SPLITS]
        return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]
    # Bare bins can be 18 GB: their sizes and 4,096 tokens spread over each stand for them.
    digest = hashlib.sha256()
    for split in SPLITS:
        n = len(tokens[split])
        digest.update(str(n).encode())
        digest.update(np.asarray(tokens[split][np.arange(4096) * n // 4096]).tobytes())
    return f"sampled-{digest.hexdigest()[:16]}"
