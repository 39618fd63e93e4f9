"""Turn text into token bins: data/<name>/train.bin, val.bin and meta.json.

python prepare_owt.py --source=stdlib       the embedded corpus: Python's own standard library, a token a byte
"""

import math
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
import data
from runlog import versions


@dataclass
class PrepareConfig:
    """What to tokenise, and how to split it."""

    source: Literal["stdlib"] = "stdlib"  # stdlib: the .py files of the running interpreter's standard library
    out_dir: str | None = None  # where the bins go; none: data/ and the name of the source
    val_fraction: float = 0.05  # of the documents, for validation
    seed: int = 2357  # of the split


def stdlib_documents():
    """The running interpreter's standard library: the text of each .py file outside site-packages and test folders."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "test", "tests", "idle_test"}
    for path in sorted(root.rglob("*.py")):
        if not outside.intersection(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def split(n_documents, val_fraction, seed):
    """Indices of the training and of the validation documents, in the order in which they stand in the bins."""
    order = np.random.default_rng(seed).permutation(n_documents)
    n_val = math.ceil(val_fraction * n_documents)
    return {"train": order[n_val:], "val": order[:n_val]}


def prepare(cfg):
    """Write the bins of cfg. Raises ValueError when they are there already."""
    folder = Path(cfg.out_dir or f"data/{cfg.source}")
    if (folder / "meta.json").exists():
        raise ValueError(f"{folder} holds prepared data already: use it, or delete the folder to prepare it again")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = data.get_tokenizer("bytes")
    documents = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in stdlib_documents()]
    dtype = data.dtype_for(tokenizer.n_vocab)
    splits = {}
    for name, indices in split(len(documents), cfg.val_fraction, cfg.seed).items():
        tokens = np.concatenate([documents[index] for index in indices]).astype(data.DTYPES[dtype])
        temporary = folder / f"{name}.bin.tmp"
        tokens.tofile(temporary)
        splits[name] = {"tokens": len(tokens), "documents": len(indices), "sha256": data.sha256_of(temporary)}
        os.replace(temporary, folder / f"{name}.bin")
        print(f"{folder / name}.bin: {len(indices):,} documents, {len(tokens):,} tokens")
    data.write_manifest(
        folder,
        tokenizer="bytes",
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot_token,
        dtype=dtype,
        splits=splits,
        source={"id": "stdlib", "revision": f"Python {platform.python_version()}"},
        split={"seed": cfg.seed, "val_fraction": cfg.val_fraction},
        versions=versions(),
    )


def main(argv):
    """The command; see the module's docstring."""
    prepare(configurator.parse(PrepareConfig, argv))


if __name__ == "__main__":
    configurator.run(main)
