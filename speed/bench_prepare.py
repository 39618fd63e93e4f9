"""Measure the preparation of data: prepare_owt.py beside `datasets.map`, on the same text.

python -m speed.bench_prepare             both on 500 MB of text: tokens/s, peak memory, peak disk
python -m speed.bench_prepare --gather    2 GB of tokens gathered into the order of the split, beside copying the file

The text is synthetic: excerpts of Python's standard library with random letters inserted, so that no document and few
words repeat. Prints Markdown tables.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from configurator import FilePath
from corpus import gathering, reading, sources, token_file, tokenizers
from engine.files import sha256_of
from studies import page

MEAN_TOKENS = 1128  # per document of OpenWebText
RANDOM_READS = 20_000
COMMAND = ("-m", "speed.bench_prepare")
DATASETS_MAP = "datasets.map, 2 processes, then writing"


@dataclass
class BenchPrepareConfig:
    """What to measure."""

    megabytes: int = 500  # of text
    repeats: int = 3  # runs of each method; the tables have the medians
    out_dir: FilePath = "out/bench_prepare"  # a new folder for the text and what is made of it; deleted at the end
    gather: bool = False  # measure only how tokens are gathered into the order of the split
    gather_gigabytes: float = 2.0  # of tokens, with --gather
    in_process: bool = False  # used internally: run datasets.map, or with --gather the gathering, in this process

    def __post_init__(self):
        configurator.require(self, positive="megabytes repeats gather_gigabytes")
        ignored, other = ("megabytes", "without") if self.gather else ("gather_gigabytes", "with")
        if getattr(self, ignored) != getattr(BenchPrepareConfig, ignored):
            raise ValueError(f"--{ignored} has an effect only {other} --gather: leave --{ignored} out")


def write_text(folder, megabytes, n_files=4):
    """Write Parquet files of `megabytes` MB of text in total, 1,000 documents per row group; returns their glob."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    modules = [Path(file.path).read_text(encoding="utf-8", errors="replace") for file in sources.stdlib_files()]
    rng = random.Random(0)
    for number in range(n_files):
        texts, size = [], 0
        while size < megabytes * 1e6 / n_files:
            source = rng.choice(modules)
            begin = rng.randrange(max(1, len(source) - 2000))
            source = source[begin : begin + int(rng.lognormvariate(8, 1))]  # a mean of 5 kB, as in OpenWebText
            cuts = sorted(rng.choices(range(len(source) + 1), k=len(source) // 500))
            pieces = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
            text = pieces[0] + "".join("".join(rng.choices("etaoinshrdlu", k=3)) + piece for piece in pieces[1:])
            texts.append(text)
            size += len(text.encode())
        pq.write_table(pa.table({"text": texts}), folder / f"text-{number}.parquet", row_group_size=1000)
    return str(folder / "*.parquet")


def datasets_map(pattern, folder):
    """Write the bins that prepare_owt.py would write: `datasets.map` with two processes, then its rows shard by shard.

    Prints the seconds from the split on, when the libraries and the text are loaded.
    """
    import datasets

    encoding = tokenizers.get_tokenizer("gpt2")

    def encode(row):
        ids = encoding.encode_ordinary(row["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "n": len(ids)}

    rows = datasets.load_dataset("parquet", data_files=pattern, split="train")
    began = time.perf_counter()
    parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    folder.mkdir(parents=True)
    for name, part in (("train", parts["train"]), ("val", parts["test"])):
        encoded = part.map(encode, remove_columns=["text"], num_proc=2)
        out = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(encoded["n"][:]),))
        end, n_shards = 0, min(1024, len(encoded))
        for index in range(n_shards):
            shard = encoded.shard(n_shards, index, contiguous=True).with_format("numpy")
            ids = np.concatenate(list(shard["ids"][:]))
            out[end : end + len(ids)] = ids
            end += len(ids)
        out.flush()
    print(f"after_loading={time.perf_counter() - began}")


def process_tree(pid):
    """The process ids of a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in process_tree(int(child)))]


def memory_bytes(pids):
    """The memory of processes (PSS without mapped files): memory that they share counts once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def disk_bytes(folder):
    """The disk space that the files in a folder occupy."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def run_and_watch(command, folder, environment):
    """Run a command that writes to `folder`: its seconds, peak memory and disk in bytes, and its standard output."""
    peaks, ended = {"memory": 0, "disk": 0}, threading.Event()
    began = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:

        def watch():
            while not ended.wait(0.1):
                peaks["memory"] = max(peaks["memory"], memory_bytes(process_tree(process.pid)))
                peaks["disk"] = max(peaks["disk"], disk_bytes(folder))

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = process.communicate()[0]
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
    if process.returncode:
        raise ValueError(
            f"`{' '.join(map(str, command))}` ended with status {process.returncode}: its own message, above, says why"
        )
    return {"seconds": seconds, **peaks, "output": output}


def measure_preparation(cfg):
    """Run both methods in turn, check that their bins are equal, and print the table and the ratios."""
    folder = Path(cfg.out_dir)
    work = folder / "work"
    pattern = write_text(folder / "text", cfg.megabytes)
    source_bytes = disk_bytes(folder / "text")
    text_bytes = sum(
        reading.text_bytes(sources.text_file(str(path), path.name), "text") for path in folder.glob("text/*")
    )
    commands = {
        DATASETS_MAP: [*COMMAND, "--in_process", f"--out_dir={folder}"],
        "prepare_owt.py": [
            configurator.ROOT / "prepare_owt.py",
            "--source=files",
            f"--files={pattern}",
            "--val_fraction=0.0005",
            f"--out_dir={work / 'bins'}",
        ],
    }
    environment = {
        "HF_HOME": str(work / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    results, sums = {method: [] for method in commands}, set()
    for _ in range(cfg.repeats):
        for method, options in commands.items():
            result = run_and_watch([sys.executable, *options], work, environment)
            bins = [work / "bins" / f"{name}.bin" for name in ("train", "val")]
            sums.add(tuple(sha256_of(path) for path in bins))
            result["bins"] = sum(path.stat().st_size for path in bins)
            result["rate"] = result["bins"] / 2 / result["seconds"]  # a token is two bytes
            if method == DATASETS_MAP:
                seconds = float(result["output"].rpartition("after_loading=")[2])
                result["rate_after_loading"] = result["bins"] / 2 / seconds
            results[method].append(result)
            shutil.rmtree(work)
    assert len(sums) == 1, f"the methods wrote different bins: {sums}"
    shutil.rmtree(folder)

    def median(method, name):
        return statistics.median(result[name] for result in results[method])

    rows = [
        [
            method,
            f"{median(method, 'seconds'):.2f}",
            f"{median(method, 'rate'):,.0f}",
            f"{median(method, 'memory') / 1e6:.0f}",
            f"{median(method, 'disk') / 1e6:.0f}",
            f"{median(method, 'disk') / median(method, 'bins'):.2f}",
        ]
        for method in commands
    ]
    head = ["method", "seconds", "tokens/s", "peak memory, MB", "peak disk beyond the source, MB", "disk / bins"]
    ours = median("prepare_owt.py", "rate")
    ratios = [ours / median(DATASETS_MAP, name) for name in ("rate", "rate_after_loading")]
    parts = [
        page.Paragraph(
            f"{text_bytes / 1e6:.0f} MB of text in {source_bytes / 1e6:.0f} MB of Parquet, {os.cpu_count()} CPU cores, "
            f"medians of {cfg.repeats} runs, the methods in turn; their bins are equal byte for byte."
        ),
        page.Table(head, rows, words=("method",)),
        page.Paragraph(
            f"In tokens/s prepare_owt.py is {ratios[0]:.1f} times as fast, or {ratios[1]:.1f} times if datasets.map "
            "is timed only from the split on, with its libraries loaded and the text in its Arrow cache."
        ),
    ]
    print("\n" + page.markdown(parts), end="")


def drop_from_cache(path):
    """Remove a file from the system's page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function, *arguments):
    """(seconds, result) of a call."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def write_tokens(path, gigabytes):
    """Write a file of random tokens, in documents of OpenWebText's mean length; returns the number of documents."""
    rng, eot, n_documents = np.random.default_rng(0), 50256, 0
    with open(path, "wb") as file:
        while file.tell() < gigabytes * 1e9:
            lengths = np.maximum(1, rng.lognormal(np.log(MEAN_TOKENS) - 0.5, 1, 20_000)).astype(np.int64)
            ids = rng.integers(0, eot, lengths.sum(), dtype=np.uint16)
            ids[np.cumsum(lengths) - 1] = eot
            ids.tofile(file)
            n_documents += len(lengths)
    return n_documents


def time_gather(cfg):
    """Write tokens, time each step of gathering them and what it is compared with, and print `name=value` lines."""
    folder, dtype = Path(cfg.out_dir), np.dtype("<u2")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokens.bin"
    n_documents = write_tokens(path, cfg.gather_gigabytes)
    drop_from_cache(path)

    def copy():
        with open(path, "rb") as source, open(folder / "copy.bin", "wb") as target:
            shutil.copyfileobj(source, target, 2**24)
            os.fsync(target.fileno())

    print(f"documents={n_documents}")
    print(f"bytes={path.stat().st_size}")
    print(f"copy={timed(copy)[0]}")
    (folder / "copy.bin").unlink()
    drop_from_cache(path)
    seconds, lengths = timed(token_file.document_lengths, path, dtype, 50256, n_documents)
    ends = np.cumsum(lengths)
    print(f"ends={seconds}")
    orders, token_bytes = gathering.split(n_documents, 0.0005, 2357), np.full(50257, 4, np.uint16)
    drop_from_cache(path)
    print(f"gather={timed(gathering.gather, path, ends, orders, folder, token_bytes, dtype)[0]}")
    drop_from_cache(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead, as if memory were short
        sample = orders["train"][:RANDOM_READS].tolist()

        def read_one_by_one():
            for document in sample:
                begin = int(ends[document - 1]) if document else 0
                os.pread(file.fileno(), 2 * (int(ends[document]) - begin), 2 * begin)

        print(f"read={timed(read_one_by_one)[0] / len(sample)}")


def measure_gather(cfg):
    """Run `time_gather` in processes of its own and print the table."""
    folder, runs = Path(cfg.out_dir), []
    for _ in range(cfg.repeats):
        options = ["--in_process", "--gather", f"--out_dir={folder}", f"--gather_gigabytes={cfg.gather_gigabytes}"]
        result = run_and_watch([sys.executable, *COMMAND, *options], folder, {})
        values = dict(line.split("=") for line in result["output"].splitlines())
        runs.append({"memory": result["memory"], **{name: float(value) for name, value in values.items()}})
        shutil.rmtree(folder)
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    size, documents = median["bytes"], median["documents"]
    steps = {
        "find the documents (only after an interruption)": median["ends"],
        "gather, with SHA-256": median["gather"],
        "for comparison: copy the file": median["copy"],
        f"for comparison: only read each document where it is (from {RANDOM_READS:,} of them)": documents
        * median["read"],
    }
    rows = [[step, f"{seconds:.2f}", f"{size / seconds / 1e6:,.0f}"] for step, seconds in steps.items()]
    parts = [
        page.Paragraph(
            f"{size / 1e9:.2f} GB of tokens, {documents:,.0f} documents, medians of {cfg.repeats} runs; no file is in "
            "the system's page cache when it is read."
        ),
        page.Table(["step", "seconds", "MB/s of tokens"], rows, words=("step",)),
        page.Paragraph(f"Peak memory, writing the tokens included: {median['memory'] / 1e6:.0f} MB."),
    ]
    print("\n" + page.markdown(parts), end="")


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(BenchPrepareConfig, argv)
    folder = Path(cfg.out_dir)
    if cfg.in_process and cfg.gather:
        time_gather(cfg)
    elif cfg.in_process:
        datasets_map(str(folder / "text" / "*.parquet"), folder / "work" / "bins")
    elif folder.exists():
        raise ValueError(f"--out_dir must name a new folder, got {folder}, which exists: delete it, or name another")
    elif cfg.gather:
        measure_gather(cfg)
    else:
        measure_preparation(cfg)


if __name__ == "__main__":
    configurator.run(main)
