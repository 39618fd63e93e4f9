"""From text to token bins: data/<name>/train.bin, val.bin and meta.json, the same bytes on every machine.

python prepare_owt.py                                  OpenWebText, GPT-2 tokens and nanoGPT's split (24 GB to download)
python prepare_owt.py --source=stdlib                  the embedded corpus: Python's standard library, bytes as tokens
python prepare_owt.py --source=files --files='texts/*.jsonl.zst' --out_dir=data/mine
python prepare_owt.py --source=owner/dataset --revision=… --subset=… --text_column=text
python prepare_owt.py --verify --out_dir=data/openwebtext           are the bins still those of their meta.json?
python prepare_owt.py --pack=mine.tar.xz --out_dir=data/mine        bins and meta.json in one compressed file
python prepare_owt.py --unpack=mine.tar.xz --out_dir=data/mine      … on a machine without a network

First every document is encoded, in the order of the source, into one token file in out_dir/unfinished; then its
documents are written in the order of the split. The disk holds the tokens twice, the memory only a part of them. An
interrupted preparation is resumed by repeating the command, and ends in the same bins. See corpus/README.md.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import platform
import shlex
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import configurator
import data
from configurator import FilePath
from corpus import disk, encoding, gathering, hub, openwebtext, packing, reading, sources, token_file, tokenizers
from corpus.disk import require_space
from corpus.progress import Progress
from engine.files import make_folder, remove_temporaries, sha256_of

LOCAL_VAL_FRACTION = 0.05  # for the embedded corpus and for files, which are small
FEW_DOCUMENTS, FEW_TOKENS = 20, 100_000  # of a validation split: fewer make its loss imprecise


@dataclass
class PrepareConfig:
    """What to tokenise, and how to split it."""

    # source
    source: str = "openwebtext"  # or stdlib, or files, or the id of a dataset on the Hugging Face hub: owner/name
    files: str | None = None  # for source=files: files, folders, patterns, separated by commas; see corpus/README.md
    revision: str | None = None  # of a dataset on the hub: commit, tag or branch; none: the latest, named in meta.json
    subset: str | None = None  # of a dataset on the hub that has several
    text_column: str = "text"  # the column or JSON field that holds the text; outer.inner for one in a struct or object

    # tokens and split
    tokenizer: str = "auto"  # gpt2, gpt2:4096 (its first tokens), bytes, or a tokenizer.json; auto: bytes or gpt2
    val_fraction: float | None = None  # for validation; none: 0.05 for stdlib and files, nanoGPT's 0.0005 for the hub
    seed: int = 2357  # of the split

    # bins
    out_dir: FilePath | None = None  # where the bins go; none: data/ and the last part of the source's name
    verify: bool = False  # prepare nothing: compare the bins in out_dir with their meta.json
    pack: FilePath | None = None  # prepare nothing: put the bins in out_dir and their meta.json into this file
    unpack: FilePath | None = None  # prepare nothing: get the bins out of this file, compared with their sums

    def __post_init__(self):
        if (self.source == "files") != bool(self.files):
            raise ValueError("--source=files and --files='…' go together: give both or neither")
        if bool(self.verify) + bool(self.pack) + bool(self.unpack) > 1:
            raise ValueError("--verify, --pack=… and --unpack=… are commands of their own: give one of them")
        if self.unpack and not self.out_dir:
            raise ValueError("--unpack needs --out_dir: the folder for the bins, such as --out_dir=data/mine")
        for name in ("revision", "subset"):
            if getattr(self, name) and self.source in ("openwebtext", "stdlib", "files"):
                raise ValueError(f"--{name} is for a dataset on the hub, owner/name, not for --source={self.source}")
        self.out_dir = self.out_dir or f"data/{Path(self.source).name}"
        if self.source == "openwebtext":
            self.source, self.subset, self.revision = openwebtext.SOURCE
        is_local = self.source in ("stdlib", "files")
        if self.tokenizer == "auto":
            self.tokenizer = "bytes" if self.source == "stdlib" else "gpt2"
        if self.tokenizer.endswith(".json"):
            self.tokenizer = str(Path(self.tokenizer).expanduser().resolve())  # for sample.py, from any folder
        if self.val_fraction is None:
            self.val_fraction = LOCAL_VAL_FRACTION if is_local else openwebtext.NANOGPT_SPLIT["val_fraction"]
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be greater than 0 and less than 1, got {self.val_fraction}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {self.seed}")


def available_cpus():
    """How many CPUs this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def encode(cfg, files, store, encoder):
    """Encode the documents of files that `store` does not hold yet; returns the encoder that was used in the end."""
    text_bytes = sum(reading.text_bytes(file, cfg.text_column) for file in files)
    if store.documents:
        print(f"resuming after {store.documents:,} documents")
    try:
        n_tokens = expected_tokens(cfg, files, text_bytes, encoder)
        left = max(0, 2 * n_tokens * encoder.dtype.itemsize - store.size)
        require_space((store.path.parent, left, f"2 × the bins, {n_tokens:,} tokens"))
        batches = reading.batches(files, cfg.text_column, store.file, store.file_documents)
        with Progress(f"encoding with {encoder.name}", text_bytes, store.text_bytes) as progress:
            for batch, ids, lengths in encoding.encoded(encoding.with_checks(batches), encoder, available_cpus()):
                store.append(batch, ids, lengths)
                progress.update(batch.texts.nbytes)
    except encoding.DisagreementError as error:
        print(f"gigatoken disagrees with tiktoken ({error}): encoding everything again, with tiktoken")
        store.start_again()
        return encode(cfg, files, store, encoding.Encoder(cfg.tokenizer, use_gigatoken=False))
    return encoder


def expected_tokens(cfg, files, text_bytes, encoder):
    """How many tokens the files will give: known for OpenWebText, else estimated from the beginnings of three files."""
    if (cfg.source, cfg.tokenizer) == (openwebtext.SOURCE[0], "gpt2"):
        return openwebtext.COUNTS["tokens"]
    sampled, ids = 0, 0
    for index in sorted({0, len(files) // 2, len(files) - 1}):
        for batch in itertools.islice(reading.batches(files[index : index + 1], cfg.text_column), 1):
            batch = dataclasses.replace(batch, texts=batch.texts[:100])
            sampled, ids = sampled + batch.texts.nbytes, ids + len(encoder(batch)[0])
    return text_bytes * ids // max(1, sampled)


def prepare(cfg):
    """Write the bins and the manifest of cfg, resuming an earlier call that was interrupted; returns the manifest.

    Raises ValueError for whatever a user can correct; what was done is kept. For OpenWebText it is also raised when
    everything is written but the counts are not the known ones.
    """
    with disk.errors(cfg.out_dir):
        manifest = _prepare(cfg, Path(cfg.out_dir), Path(cfg.out_dir) / "unfinished")
    openwebtext.check_counts(cfg.out_dir, manifest)
    val = manifest["splits"]["val"]
    if val["documents"] < FEW_DOCUMENTS or val["tokens"] < FEW_TOKENS:
        print(
            f"warning: the validation split is small (documents: {val['documents']:,}, tokens: {val['tokens']:,}), so "
            "its loss is imprecise: use a larger --val_fraction, or more text"
        )
    if min(counts["tokens"] for counts in manifest["splits"].values()) > 1:
        print(f"train on it: {training_command(Path(cfg.out_dir), manifest)}")
    return manifest


def _prepare(cfg, folder, work):
    source, files = sources.describe_source(cfg)
    manifest = data.read_manifest(folder)
    if manifest is not None:
        split = {"seed": cfg.seed, "val_fraction": cfg.val_fraction}
        if differences := _differences(manifest, {"source": source, "tokenizer": cfg.tokenizer, "split": split}):
            raise ValueError(
                f"{folder} holds bins prepared with other settings ({'; '.join(differences)}): choose another "
                "--out_dir, or delete the folder"
            )
        for name in manifest["splits"]:
            check_size(folder, name, manifest)
        shutil.rmtree(work, ignore_errors=True)  # left where the process ended between the last two steps
        print(f"{folder} is prepared already, with the same settings")
        return manifest
    if any((folder / f"{name}.bin").exists() for name in data.SPLITS) and not work.exists():
        raise ValueError(f"{folder} holds bins without a meta.json: move them, or choose another --out_dir")
    tokenizers.get_tokenizer(cfg.tokenizer)  # so that a missing vocabulary is reported before the download
    if files is None:
        found = hub.find(cfg, work)
        source["revision"] = found.revision
        if found.missing:
            needs = [(hub.cache_folder(), found.missing_bytes, "the download")]
            if found.repository == openwebtext.SOURCE[0]:
                needs.append((work, 4 * openwebtext.COUNTS["tokens"], "2 × the bins"))
            require_space(*needs)
        files = hub.download(found)
        if cfg.revision not in (None, found.revision):
            source["requested_revision"] = cfg.revision
    return _encode_and_gather(cfg, folder, work, source, files)


def _encode_and_gather(cfg, folder, work, source, files):
    described = {name: source[name] for name in source if name not in ("files", "requested_revision")}
    settings = {"source": described, "tokenizer": cfg.tokenizer}
    tokenizer = tokenizers.get_tokenizer(cfg.tokenizer)
    dtype, eot, records = data.dtype_for(tokenizer.n_vocab), tokenizer.eot_token, [file.record() for file in files]
    split = {"seed": cfg.seed, "val_fraction": cfg.val_fraction}
    token_bytes = tokenizers.token_bytes(tokenizer)
    made = make_folder(work)
    with contextlib.closing(token_file.TokenFile(work, settings, records, data.DTYPES[dtype], eot)) as store:
        try:
            encoder = encode(cfg, files, store, encoding.Encoder(cfg.tokenizer, store.use_gigatoken))
            if store.documents == 1:
                split["by"] = "position"
                ends, orders = gathering.split_by_position(store.size // data.DTYPES[dtype].itemsize, cfg.val_fraction)
            else:
                ends, orders = store.document_ends(), gathering.split(store.documents, cfg.val_fraction, cfg.seed)
            for name in orders:
                (folder / f"{name}.bin").unlink(missing_ok=True)  # where the process ended before it wrote meta.json
            remove_temporaries(folder)
            with Progress("gathering", 4 * store.size) as progress:
                splits = gathering.gather(
                    store.path, ends, orders, work, token_bytes, data.DTYPES[dtype], progress.update
                )
            if "by" in split:
                splits["train"]["documents"] = 0  # as its end-of-text tokens: the document ends in val.bin
        except BaseException:
            for name in data.SPLITS:
                (work / f"{name}.bin").unlink(missing_ok=True)  # incomplete, but perhaps large
            with contextlib.suppress(
                OSError, ValueError
            ):  # if there is no space for this either, the last commit remains
                store.commit()
            if made and not store.size:  # refused before anything was encoded
                shutil.rmtree(work, ignore_errors=True)
                for place in made[1:]:
                    with contextlib.suppress(OSError):
                        place.rmdir()
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
            split=split,
            encoder=encoder.name,
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}
            | encoder.versions(),
        )
    shutil.rmtree(work)
    if "by" in split:
        print(
            f"one document, split by position: the last {100 * cfg.val_fraction:g} % of its tokens are for validation"
        )
    for name, counts in splits.items():
        documents, n_tokens = f"{counts['documents']:,} documents", f"{counts['tokens']:,} tokens"
        n_bytes = f" of {counts['bytes']:,} bytes" if "bytes" in counts else ""
        print(f"{folder / name}.bin: {documents}, {n_tokens}{n_bytes}, SHA-256 {counts['sha256']}")
    return manifest


def _differences(manifest, wanted, prefix=""):
    """What a manifest says that differs from the nested dict `wanted`, as a list of texts."""
    texts = []
    for name, value in wanted.items():
        found = manifest.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            texts += _differences(found, value, f"{name}.")
        elif name == "files" and isinstance(found, list):
            texts += [f"other files: {change}" for change in _changed_files(found, value)[:1]]
        elif found != value and not (name == "revision" and manifest.get("requested_revision") == value):
            texts.append(f"{prefix}{name} is {found!r}, not {value!r}")
    return texts


def _changed_files(before, now):
    """How the files' identities differ, as a list of texts; an older manifest has less to compare."""
    before, now = ({file["name"]: file for file in files} for files in (before, now))
    texts = [f"{name} was not among them" for name in now if name not in before]
    texts += [f"{name} was among them" for name in before if name not in now]
    both = [name for name in now if name in before]
    return texts + [
        f"{name} has changed since"
        for name in both
        if any(before[name][key] != now[name][key] for key in before[name].keys() & now[name].keys())
    ]


def training_command(folder, manifest):
    """The command that trains the W_Q = I model on the bins in folder: the paper's size for 1e9 tokens or more."""
    n_train, n_val = (manifest["splits"][name]["tokens"] for name in ("train", "val"))
    is_large = n_train >= 1e9
    defaults = {"data_dir": "data", "dataset": "openwebtext", "vocab_size": 50304, "block_size": 1024}
    if not is_large:
        defaults |= {"dataset": "stdlib", "vocab_size": 320, "block_size": 128}  # those of config/quick.py
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    block_size = defaults["block_size"]
    while block_size > 1 and block_size >= min(n_train, n_val):  # a window has one token more
        block_size //= 2
    values = {
        "data_dir": str(folder.parent),
        "dataset": folder.name,
        "vocab_size": 64 * math.ceil(manifest["vocab_size"] / 64),  # as GPT-2's 50,257 is padded to 50,304
        "block_size": block_size,
    }
    root = "" if Path.cwd() == configurator.ROOT else f"{configurator.ROOT}/"
    names = ["train.py", *([] if is_large else ["config/quick.py"]), "config/reduced_tied.py"]
    options = [f"--{name}={value}" for name, value in values.items() if value != defaults[name]]
    return shlex.join(["python", *(root + name for name in names), *options])


def check_size(folder, name, manifest):
    """The path of a split's bin. Raises ValueError when it is missing, or not as long as its manifest says."""
    path, itemsize = Path(folder) / f"{name}.bin", data.DTYPES[manifest["dtype"]].itemsize
    if not path.exists():
        raise ValueError(f"{path} is missing: delete the folder and prepare it again")
    expected, found = manifest["splits"][name]["tokens"] * itemsize, path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} is damaged: it has {found:,} bytes, meta.json says {expected:,}; delete the folder and prepare it "
            "again"
        )
    return path


def verify(folder):
    """Compare the bins in folder with the sums and counts in its meta.json. Raises ValueError when they differ."""
    manifest = data.read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no meta.json to compare with: prepare it first, or name it with --out_dir")
    for name, expected in manifest["splits"].items():
        path, digest, documents = check_size(folder, name, manifest), hashlib.sha256(), 0
        with open(path, "rb") as file:
            while len(tokens := np.fromfile(file, data.DTYPES[manifest["dtype"]], 2**22)):
                digest.update(tokens)
                documents += np.count_nonzero(tokens == manifest["eot"])
        if digest.hexdigest() != expected["sha256"]:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, meta.json says {expected['sha256']}; delete "
                "the folder and prepare it again"
            )
        if documents != expected["documents"]:
            raise ValueError(
                f"{path} has {documents:,} end-of-text tokens, meta.json says {expected['documents']:,} documents: "
                "delete the folder and prepare it again"
            )
        print(f"{path}: {documents:,} documents, {expected['tokens']:,} tokens, {digest.hexdigest()}, as in meta.json")
    openwebtext.check_counts(folder, manifest)


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(PrepareConfig, argv)
    with disk.errors(cfg.out_dir):
        if cfg.verify:
            verify(cfg.out_dir)
        elif cfg.pack:
            packing.pack(cfg.out_dir, cfg.pack, available_cpus())
            print(f"{cfg.pack}: {os.path.getsize(cfg.pack):,} bytes, SHA-256 {sha256_of(cfg.pack)}")
        elif cfg.unpack:
            manifest = packing.unpack(cfg.unpack, cfg.out_dir)
            for name, counts in manifest["splits"].items():
                print(f"{Path(cfg.out_dir) / name}.bin: {counts['tokens']:,} tokens, SHA-256 {counts['sha256']}")
            print(f"train on it: {training_command(Path(cfg.out_dir), manifest)}")
        else:
            prepare(cfg)


if __name__ == "__main__":
    configurator.run(main)
