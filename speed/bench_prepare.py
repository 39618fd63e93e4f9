"""What preparing data costs: the usual way, `datasets.map` and then writing, against prepare_owt.py, on the same text.

python -m speed.bench_prepare             both on 500 MB of text: tokens/s, peak memory, peak disk
python -m speed.bench_prepare --gather    2 GB of tokens put into the order of the split, against plain copying

The text is made here: Python's standard library, again and again, each time with other letters strewn in, so that no
document and few words repeat. Prints Markdown tables.
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
from typing import Literal

import numpy as np

import configurator
from corpus import gathering, sources, token_file, tokenizers
from engine.files import sha256_of

MEAN_DOCUMENT = 1128  # tokens of a document of OpenWebText
RANDOM_READS = 20_000
THIS = ("-m", "speed.bench_prepare")


@dataclass
class BenchConfig:
    """What to measure."""

    megabytes: int = 500  # of text
    repeats: int = 3  # of each way; the tables have the medians
    out_dir: str = "out/bench_prepare"  # for the text and what becomes of it; deleted at the end
    gather: bool = False  # measure only the second pass, on synthetic tokens
    gather_gigabytes: float = 2.0  # of tokens
    way: Literal["all", "usual", "gather"] = "all"  # a process of its own for one way; all starts them


def write_text(folder, megabytes, n_files=4):
    """Parquet files with `megabytes` MB of text in all, 1,000 documents a row group; the glob that matches them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    programs = [Path(file.path).read_text(encoding="utf-8", errors="replace") for file in sources.stdlib_files()]
    rng = random.Random(0)
    for number in range(n_files):
        texts, size = [], 0
        while size < megabytes * 1e6 / n_files:
            source = rng.choice(programs)
            begin = rng.randrange(max(1, len(source) - 2000))
            source = source[begin : begin + int(rng.lognormvariate(8, 1))]  # documents of 5 kB, as OpenWebText's
            cuts = sorted(rng.choices(range(len(source) + 1), k=len(source) // 500))
            pieces = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
            text = pieces[0] + "".join("".join(rng.choices("etaoinshrdlu", k=3)) + piece for piece in pieces[1:])
            texts.append(text)
            size += len(text.encode())
        pq.write_table(pa.table({"text": texts}), folder / f"text-{number}.parquet", row_group_size=1000)
    return str(folder / "*.parquet")


def usual_way(pattern, folder):
    """The bins by `datasets.map` over two processes, whose cached rows are then written one piece after the other."""
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
        tokens_in_all = sum(encoded["n"][:])
        out = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(tokens_in_all,))
        end, pieces = 0, min(1024, len(encoded))
        for piece in range(pieces):
            ids = encoded.shard(pieces, piece, contiguous=True).with_format("numpy")["ids"][:]
            ids = np.concatenate(list(ids))
            out[end : end + len(ids)] = ids
            end += len(ids)
        out.flush()
    print(f"after_loading={time.perf_counter() - began}")


def process_tree(pid):
    """pid and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(inner for child in children for inner in process_tree(int(child)))]


def memory_bytes(pids):
    """The memory of processes; what they share counts once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def disk_bytes(folder):
    """The space that the files in a folder take."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def measure(command, folder, environment):
    """Run a command that works in `folder`: seconds, peak memory and disk in bytes, and what it printed."""
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
        raise ValueError(f"{' '.join(map(str, command))} ended with status {process.returncode}")
    return {"seconds": seconds, **peaks, "output": output}


def compare(cfg):
    """Measure both ways in turn, check that their bins are equal, and print the table."""
    folder = Path(cfg.out_dir)
    pattern = write_text(folder / "text", cfg.megabytes)
    source_bytes = disk_bytes(folder / "text")
    text_bytes = sum(
        sources.text_bytes(sources.text_file(str(path), path.name), "text") for path in folder.glob("text/*")
    )
    results, sums = {"usual": [], "prepare_owt.py": []}, set()
    for _ in range(cfg.repeats):
        for way in results:
            work = folder / "work"
            if way == "usual":
                options = [*THIS, "--way=usual", f"--out_dir={folder}"]
            else:
                options = [
                    configurator.ROOT / "prepare_owt.py",
                    "--source=files",
                    f"--files={pattern}",
                    f"--out_dir={work / 'bins'}",
                ]
            environment = {
                "HF_HOME": str(work / "cache"),
                "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            result = measure([sys.executable, *options], work, environment)
            bins = [work / "bins" / f"{name}.bin" for name in ("train", "val")]
            result["bins"] = sum(path.stat().st_size for path in bins)
            sums.add(tuple(sha256_of(path) for path in bins))
            result["rate"] = result["bins"] / 2 / result["seconds"]
            if way == "usual":
                after = float(result["output"].rpartition("after_loading=")[2])
                result["rate_after_loading"] = result["bins"] / 2 / after
            results[way].append(result)
            shutil.rmtree(work)
    if len(sums) != 1:
        raise ValueError("the two ways gave different bins")
    shutil.rmtree(folder)

    def median(way, what):
        return statistics.median(result[what] for result in results[way])

    documents = f"{text_bytes / 1e6:.0f} MB of text in {source_bytes / 1e6:.0f} MB of Parquet"
    print(
        f"\n{documents}, {os.cpu_count()} CPU cores, medians of {cfg.repeats} runs; the bins are equal byte for byte.\n"
    )
    print("| way | seconds | tokens/s | peak memory, MB | peak disk beyond the source, MB | disk / bins |")
    print("|---|---:|---:|---:|---:|---:|")
    for way in results:
        bins, disk = median(way, "bins"), median(way, "disk")
        print(
            f"| {way} | {median(way, 'seconds'):.2f} | {median(way, 'rate'):,.0f} | {median(way, 'memory') / 1e6:.0f} "
            f"| {disk / 1e6:.0f} | {disk / bins:.2f} |"
        )
    ours, usual = median("prepare_owt.py", "rate"), median("usual", "rate")
    without_loading = median("usual", "rate_after_loading")
    print(
        f"\nprepare_owt.py makes {ours / usual:.1f} times the tokens/s; {ours / without_loading:.1f} times if the "
        "usual way is only timed from the split on, with its libraries loaded and its text in the Arrow cache."
    )


def forget(path):
    """Have the system drop a file from its cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function, *arguments):
    """Seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def write_tokens(path, gigabytes):
    """A token file of documents as long as OpenWebText's; returns their number."""
    rng, eot, n_documents = np.random.default_rng(0), 50256, 0
    with open(path, "wb") as file:
        while file.tell() < gigabytes * 1e9:
            lengths = np.maximum(1, rng.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1, 20_000)).astype(np.int64)
            ids = rng.integers(0, eot, lengths.sum(), dtype=np.uint16)
            ids[np.cumsum(lengths) - 1] = eot
            ids.tofile(file)
            n_documents += len(lengths)
    return n_documents


def gather_once(cfg):
    """Write the tokens, gather them, and print `name=value` lines."""
    folder, dtype = Path(cfg.out_dir), np.dtype("<u2")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokens.bin"
    n_documents = write_tokens(path, cfg.gather_gigabytes)
    forget(path)

    def copy():
        with open(path, "rb") as source, open(folder / "copy.bin", "wb") as target:
            shutil.copyfileobj(source, target, 2**24)
            os.fsync(target.fileno())

    print(f"documents={n_documents}")
    print(f"bytes={path.stat().st_size}")
    print(f"copy={timed(copy)[0]}")
    (folder / "copy.bin").unlink()
    forget(path)
    seconds, lengths = timed(token_file.document_lengths, path, dtype, 50256, n_documents)
    ends = np.cumsum(lengths)
    print(f"ends={seconds}")
    orders = gathering.split(n_documents, 0.0005, 2357)
    forget(path)
    print(f"gather={timed(gathering.gather, path, ends, orders, folder, dtype)[0]}")
    forget(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # as where the file is larger than the memory
        sample = orders["train"][:RANDOM_READS].tolist()

        def read_one_by_one():
            for document in sample:
                begin = int(ends[document - 1]) if document else 0
                os.pread(file.fileno(), 2 * (int(ends[document]) - begin), 2 * begin)

        print(f"read={timed(read_one_by_one)[0] / len(sample)}")


def compare_gather(cfg):
    """Measure the gather in processes of its own and print the table."""
    folder, runs = Path(cfg.out_dir), []
    for _ in range(cfg.repeats):
        options = ["--way=gather", f"--out_dir={folder}", f"--gather_gigabytes={cfg.gather_gigabytes}"]
        result = measure([sys.executable, *THIS, *options], folder, {})
        values = dict(line.split("=") for line in result["output"].splitlines())
        runs.append({"memory": result["memory"], **{name: float(value) for name, value in values.items()}})
        shutil.rmtree(folder)
    mean = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    size, documents = mean["bytes"], mean["documents"]
    print(
        f"\n{size / 1e9:.2f} GB of tokens, {documents:,.0f} documents, medians of {cfg.repeats} runs, each file out of "
        "the system's cache before it is read:\n"
    )
    print("| step | seconds | MB/s of tokens |")
    print("|---|---:|---:|")
    steps = {
        "ends": "find the documents (only after an interruption)",
        "gather": "gather, with SHA-256",
        "copy": "for comparison: copy the file",
    }
    for name, step in steps.items():
        print(f"| {step} | {mean[name]:.2f} | {size / mean[name] / 1e6:,.0f} |")
    one_by_one = mean["read"] * documents
    what = f"for comparison: only read each document where it is (from {RANDOM_READS:,} of them)"
    print(f"| {what} | {one_by_one:.2f} | {size / one_by_one / 1e6:,.0f} |")
    print(f"\nPeak memory, with the making of the tokens: {mean['memory'] / 1e6:.0f} MB.")


def main(argv):
    """The command; see the module's docstring."""
    cfg = configurator.parse(BenchConfig, argv)
    folder = Path(cfg.out_dir)
    if cfg.way == "usual":
        usual_way(str(folder / "text" / "*.parquet"), folder / "work" / "bins")
    elif cfg.way == "gather":
        gather_once(cfg)
    elif folder.exists():
        raise ValueError(f"{folder} is there already: delete it, or choose another --out_dir=…")
    elif cfg.gather:
        compare_gather(cfg)
    else:
        compare(cfg)


if __name__ == "__main__":
    configurator.run(main)
