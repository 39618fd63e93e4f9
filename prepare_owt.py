"""Turn text into token bins, once and the same for everybody: data/<name>/train.bin, val.bin and meta.json.

python prepare_owt.py                                  OpenWebText, GPT-2 tokens and nanoGPT's split (24 GB to download)
python prepare_owt.py --source=stdlib                  the embedded corpus: Python's standard library, a token a byte
python prepare_owt.py --source=files --files='texts/*.jsonl.zst' --out_dir=data/mine
python prepare_owt.py --source=owner/dataset --revision=… --subset=… --text_column=text
python prepare_owt.py --verify --out_dir=data/openwebtext           are the bins still those of their meta.json?

First every document is encoded, in the order of the source, into one token file in out_dir/unfinished; then that file
is gathered into the permuted order of the split. The disk holds the tokens twice, the memory a window of them. What was
interrupted goes on when the command is repeated, and ends in the same bins.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import configurator
import data
from corpus import encoding, gathering, sources, token_file, tokenizers
from engine.files import sha256_of

OPENWEBTEXT = ("Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c")
# What that revision has, in GPT-2 tokens; the splits' counts are for nanoGPT's seed and fraction.
OPENWEBTEXT_COUNTS = {"documents": 8_013_769, "tokens": 9_040_017_095}
OPENWEBTEXT_SPLITS = {
    "train": {"documents": 8_009_762, "tokens": 9_035_582_489},
    "val": {"documents": 4_007, "tokens": 4_434_606},
}
NANOGPT_SPLIT = {"seed": 2357, "val_fraction": 0.0005}


@dataclass
class PrepareConfig:
    """What to tokenise, and how to split it."""

    source: str = "openwebtext"  # or stdlib, or files, or the id of a dataset on the Hugging Face hub: owner/name
    files: str | None = None  # for source=files: a glob of Parquet, .jsonl(.gz, .zst); others: one plain text each
    revision: str | None = None  # of a dataset on the hub: commit, tag or branch; none: the latest, named in meta.json
    subset: str | None = None  # of a dataset on the hub that has several
    text_column: str = "text"  # the column, or the field of a JSON line, that holds the text
    tokenizer: Literal["auto", "gpt2", "bytes"] = "auto"  # auto: bytes for stdlib, gpt2 for everything else
    val_fraction: float | None = None  # of the documents, for validation; none: 0.05 for stdlib, else nanoGPT's 0.0005
    seed: int = 2357  # of the split
    out_dir: str | None = None  # where the bins go; none: data/ and the last part of the source's name
    verify: bool = False  # prepare nothing: compare the bins in out_dir with the sums in their meta.json

    def __post_init__(self):
        if (self.source == "files") != bool(self.files):
            raise ValueError("--source=files and --files='…' go together: give both or neither")
        for name in ("revision", "subset"):
            if getattr(self, name) and self.source in ("openwebtext", "stdlib", "files"):
                raise ValueError(f"--{name} is for a dataset on the hub, owner/name, not for --source={self.source}")
        self.out_dir = self.out_dir or f"data/{Path(self.source).name}"
        if self.source == "openwebtext":
            self.source, self.subset, self.revision = OPENWEBTEXT
        embedded = self.source == "stdlib"
        if self.tokenizer == "auto":
            self.tokenizer = "bytes" if embedded else "gpt2"
        if self.val_fraction is None:
            self.val_fraction = 0.05 if embedded else NANOGPT_SPLIT["val_fraction"]
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {self.val_fraction}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")


class Progress:
    """A bar in a terminal, elsewhere a line every half minute: bytes done, MB/s and the time left."""

    def __init__(self, what, total, done=0):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=what, total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._what, self._total, self._start, self._done = what, total, done, done
        self._began = self._said = time.monotonic()

    def update(self, n_bytes):
        """Count n_bytes more."""
        self._bar.update(n_bytes)
        self._done += n_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._said > 30:
            self._said, seconds = now, now - self._began
            line = self._bar.format_meter(
                self._done, self._total, seconds, initial=self._start, unit="B", unit_scale=True, prefix=self._what
            )
            print(line, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


def require_space(*needs):
    """Say how much space is needed and free. needs: (folder, bytes, what for). Raises ValueError for too little."""
    by_disk = {}
    for folder, n_bytes, purpose in needs:
        folder = Path(folder).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        by_disk.setdefault(os.stat(there).st_dev, []).append((there, n_bytes, purpose))
    for group in by_disk.values():
        free = shutil.disk_usage(group[0][0]).free
        what = " and ".join(f"{_gigabytes(n_bytes)} for {purpose}" for _, n_bytes, purpose in group)
        line = f"space: {what}; {_gigabytes(free)} are free in {group[0][0]}"
        if sum(n_bytes for _, n_bytes, _ in group) > free:
            raise ValueError(f"too little {line}: make room, or choose another --out_dir=…")
        print(line, flush=True)


def _gigabytes(n_bytes):
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.2f} MB"


def encode(cfg, files, store, encoder):
    """Encode the documents of files that `store` does not hold yet; returns the encoder with which it ended."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text_bytes = sum(sources.text_bytes(file, cfg.text_column) for file in files)
    if store.documents:
        print(f"going on after {store.documents:,} documents")
    try:
        n_tokens = expected_tokens(cfg, files, text_bytes, encoder)
        left = max(0, 2 * n_tokens * encoder.dtype.itemsize - store.size)
        require_space((store.path.parent, left, f"twice the bins, about {n_tokens:,} tokens"))
        batches = sources.batches(files, cfg.text_column, store.file, store.file_documents)
        with Progress(f"encoding with {encoder.name}", text_bytes, store.text_bytes) as progress:
            for batch, ids, lengths in encoding.encoded(encoding.with_checks(batches), encoder, workers):
                store.append(batch, ids, lengths)
                progress.update(batch.texts.nbytes)
    except encoding.DisagreementError as error:
        print(f"gigatoken disagrees with tiktoken ({error}): all is encoded again, by tiktoken")
        store.start_again()
        return encode(cfg, files, store, encoding.Encoder(cfg.tokenizer, distrust=True))
    return encoder


def expected_tokens(cfg, files, text_bytes, encoder):
    """How many tokens the files will give: known for OpenWebText, else estimated from the beginnings of three files."""
    if (cfg.source, cfg.tokenizer) == (OPENWEBTEXT[0], "gpt2"):
        return OPENWEBTEXT_COUNTS["tokens"]
    sampled, ids = 0, 0
    for index in sorted({0, len(files) // 2, len(files) - 1}):
        for batch in itertools.islice(sources.batches(files[index : index + 1], cfg.text_column), 1):
            batch = dataclasses.replace(batch, texts=batch.texts[:100])
            sampled, ids = sampled + batch.texts.nbytes, ids + len(encoder(batch)[0])
    return text_bytes * ids // max(1, sampled)


def prepare(cfg):
    """Write the bins and the manifest of cfg, going on where an earlier call stopped; returns the manifest.

    Raises ValueError for whatever a user can mend; what was done is kept. For OpenWebText it is raised, too, when all
    is written but the counts are not the known ones.
    """
    with _disk_errors(cfg.out_dir):
        manifest = _prepare(cfg, Path(cfg.out_dir), Path(cfg.out_dir) / "unfinished")
    check_openwebtext(cfg.out_dir, manifest)
    return manifest


def _prepare(cfg, folder, work):
    source, files = sources.local_source(cfg)
    manifest = data.read_manifest(folder)
    if manifest is not None:
        split = {"seed": cfg.seed, "val_fraction": cfg.val_fraction}
        if differing := _differences(manifest, {"source": source, "tokenizer": cfg.tokenizer, "split": split}):
            raise ValueError(
                f"{folder} holds bins that were prepared otherwise ({'; '.join(differing)}): choose another place with "
                "--out_dir=…, or delete the folder"
            )
        shutil.rmtree(work, ignore_errors=True)  # left over where the end came between the last two steps
        print(f"{folder} is prepared already, with the same settings")
        return manifest
    if any((folder / f"{name}.bin").exists() for name in ("train", "val")) and not work.exists():
        raise ValueError(f"{folder} holds bins without a meta.json: move them, or choose another --out_dir=…")
    tokenizers.get_tokenizer(cfg.tokenizer)  # a missing vocabulary shows before the download
    if files is None:
        hub = sources.find_on_hub(cfg, work)
        source["revision"] = hub.revision
        if hub.missing:
            needs = [(sources.hub_cache(), hub.missing_bytes, "the download")]
            if hub.repository == OPENWEBTEXT[0]:
                needs.append((work, 4 * OPENWEBTEXT_COUNTS["tokens"], "twice the bins"))
            require_space(*needs)
        files = sources.download(hub)
    work.mkdir(parents=True, exist_ok=True)
    return _encode_and_gather(cfg, folder, work, source, files)


@contextlib.contextmanager
def _disk_errors(folder):
    """Raise ValueError in place of what the operating system says of files and disks."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"no space is left for {folder} ({error.strerror}): what was done is kept; make room, then repeat the "
                "command to go on"
            ) from error
        raise ValueError(f"{error.filename or folder}: {error.strerror or error}") from error


def _encode_and_gather(cfg, folder, work, source, files):
    settings = {"source": {name: source[name] for name in source if name != "files"}, "tokenizer": cfg.tokenizer}
    tokenizer = tokenizers.get_tokenizer(cfg.tokenizer)
    dtype, eot, records = data.dtype_for(tokenizer.n_vocab), tokenizer.eot_token, [file.record() for file in files]
    with contextlib.closing(token_file.TokenFile(work, settings, records, data.DTYPES[dtype], eot)) as store:
        try:
            encoder = encode(cfg, files, store, encoding.Encoder(cfg.tokenizer, distrust=store.distrust))
            orders = gathering.split(store.documents, cfg.val_fraction, cfg.seed)
            for name in orders:
                (folder / f"{name}.bin").unlink(missing_ok=True)  # moved there by a preparation that ended right then
            with Progress("gathering", 4 * store.size) as progress:
                splits = gathering.gather(
                    store.path, store.document_ends(), orders, work, data.DTYPES[dtype], progress.update
                )
        except BaseException:
            for name in ("train", "val"):
                (work / f"{name}.bin").unlink(missing_ok=True)  # as large as it is incomplete
            with contextlib.suppress(OSError):  # if there is no place for this, either, the last commit stands
                store.commit()
            raise
        for name in orders:
            os.replace(work / f"{name}.bin", folder / f"{name}.bin")
        is_local = cfg.source in ("stdlib", "files")
        libraries = ("numpy", "pyarrow") if is_local else ("numpy", "pyarrow", "datasets", "huggingface_hub")
        manifest = data.write_manifest(
            folder,
            tokenizer=cfg.tokenizer,
            vocab_size=tokenizer.n_vocab,
            eot=eot,
            dtype=dtype,
            splits=splits,
            source=source,
            split={"seed": cfg.seed, "val_fraction": cfg.val_fraction},
            encoder=encoder.name,
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}
            | encoder.versions(),
        )
    shutil.rmtree(work)
    for name, counts in splits.items():
        documents, n_tokens = f"{counts['documents']:,} documents", f"{counts['tokens']:,} tokens"
        print(f"{folder / name}.bin: {documents}, {n_tokens}, SHA-256 {counts['sha256']}")
    return manifest


def _differences(manifest, wanted, prefix=""):
    """What a manifest says otherwise than the nested dict `wanted`, as a list of texts."""
    texts = []
    for name, value in wanted.items():
        have = manifest.get(name)
        if isinstance(value, dict) and isinstance(have, dict):
            texts += _differences(have, value, f"{name}.")
        elif have != value:
            texts.append("other files" if name == "files" else f"{prefix}{name} is {have!r}, not {value!r}")
    return texts


def check_openwebtext(folder, manifest):
    """Compare the counts of prepared OpenWebText with the known ones and say the result; nothing for other sources.

    Raises ValueError when they differ.
    """
    source, splits = manifest["source"], manifest["splits"]
    identity = (source.get("id"), source.get("subset"), source.get("revision"))
    if identity != OPENWEBTEXT or source["text_column"] != "text":
        return
    have = {"all": {name: sum(splits[part][name] for part in splits) for name in ("documents", "tokens")}} | splits
    known = {"all": OPENWEBTEXT_COUNTS} | (OPENWEBTEXT_SPLITS if manifest["split"] == NANOGPT_SPLIT else {})
    compared = ("documents", "tokens") if manifest["tokenizer"] == "gpt2" else ("documents",)
    wrong = [
        f"{part}: {have[part][name]:,} {name}, not {known[part][name]:,}"
        for part in known
        for name in compared
        if have[part][name] != known[part][name]
    ]
    if wrong:
        raise ValueError(
            f"{folder} is written, but it is not the OpenWebText that everybody has ({'; '.join(wrong)}): its results "
            "cannot be compared; meta.json names the versions of the libraries that made it"
        )
    print(f"checked: the numbers of {' and '.join(compared)} are those known of this revision")


def verify(folder):
    """Recompute the sums of the bins in folder. Raises ValueError when they are not those of its meta.json."""
    manifest = data.read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no meta.json to compare with: prepare it first, or name it with --out_dir=…")
    for name, expected in manifest["splits"].items():
        path = Path(folder) / f"{name}.bin"
        if not path.exists():
            raise ValueError(f"{path} is missing: delete the folder and prepare it again")
        found = sha256_of(path)
        if found != expected["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is {found}, not {expected['sha256']}; prepare it again")
        print(f"{path}: {expected['tokens']:,} tokens, {found} as in meta.json")
    check_openwebtext(folder, manifest)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(PrepareConfig, argv)
    if cfg.verify:
        with _disk_errors(cfg.out_dir):
            verify(cfg.out_dir)
    else:
        prepare(cfg)


if __name__ == "__main__":
    configurator.run(main)
