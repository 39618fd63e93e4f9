"""The files of a run folder: their names, what they say of the run, and what names a run."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from engine import files
from train_config import NO_PART_OF_RESULT

CONFIG = "config.json"  # the resolved configuration
FACTS = "run.json"  # what else a run is: parameters, data, commit, versions, device, segments
METRICS = "metrics.jsonl"  # one JSON object per line
DAMAGED_METRICS = "metrics.damaged"  # lines of it that were no records
CHECKPOINT, BEST = "ckpt.pt", "best.pt"  # the latest, and that with the best validation loss
LAST_GOOD = "last_good.pt"  # the checkpoint from before a run diverged
SUMMARY = "summary.json"  # marks a run as finished
NONFINITE = "nonfinite.json"  # the step at which a run diverged
RUN_FILES = (CONFIG, FACTS, METRICS, CHECKPOINT, SUMMARY)
TAIL_BYTES = 1 << 16  # of metrics.jsonl, in which the last record surely is


def holds_run(folder):
    """Whether a folder holds a run, finished or not."""
    return any((Path(folder) / name).exists() for name in RUN_FILES)


def read_metrics(folder):
    """The records of a run folder's metrics.jsonl, in order, without lines that are damaged."""
    return _split_metrics(Path(folder) / METRICS)[0]


def _split_metrics(path):
    """The records of a metrics.jsonl, and its damaged lines, bytes each; a last line that was cut short is neither."""
    records, damaged = [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            is_right = isinstance(record["step"], int) and isinstance(record["kind"], str)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_right = False
        if is_right:
            records.append(record)
        elif line.endswith(b"\n"):
            damaged.append(line)
    return records, damaged


class MetricsFile:
    """metrics.jsonl as a run writes it: what comes after start_step is cut off first.

    An evaluation at start_step is repeated by the resumed run, so its record goes, too. Damaged lines are set aside in
    metrics.damaged. past: the records that a new file begins with. Raises ValueError when the file cannot be written.
    """

    def __init__(self, folder, start_step, past=()):
        self.path = Path(folder) / METRICS
        records, damaged = _split_metrics(self.path) if self.path.exists() else (past, [])
        if damaged:
            aside = self.path.with_name(DAMAGED_METRICS)
            before = aside.read_bytes() if aside.exists() else b""
            files.write_atomically(aside, lambda file: file.write(before + b"".join(damaged)))
            print(f"warning: {self.path} had damaged lines, which are in {aside} now: {len(damaged)}")
        kept = [r for r in records if r["step"] < start_step or (r["step"] == start_step and r["kind"] == "train")]
        files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (for as long as the run)

    def append(self, record):
        """Write a record and flush it to disk. Raises ValueError, with no part of it in the file, where that fails."""
        size = os.fstat(self._file.fileno()).st_size
        left = (json.dumps(record) + "\n").encode()
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())  # a checkpoint must never be on the disk before the metrics up to its step
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise ValueError(
                f"cannot write {self.path}: {files.reason(error)}; the run stops, and --resume continues it from its "
                "last checkpoint"
            ) from error

    def close(self):
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def no_trace_of_a_failed_start(folder, start_step=0):
    """A context that removes a new run which ends in an error before its first train record, unless it diverged.

    start_step: where it begins; a branch has records of the steps before.
    """
    is_new = not holds_run(folder)
    try:
        yield
    except FloatingPointError:
        raise
    except BaseException:
        if is_new and all(r["kind"] != "train" or r["step"] <= start_step for r in read_metrics(folder)):
            remove_run(folder)
        raise


def remove_run(folder):
    """Remove the files of a run, and the folder if it holds nothing else."""
    folder = Path(folder)
    names = [*RUN_FILES, BEST, LAST_GOOD, NONFINITE, *(path.name for path in folder.glob("step_*.pt"))]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    files.remove_temporaries(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def identity(config):
    """The fields of a resolved configuration, a dict, that determine a run's result."""
    return {name: value for name, value in config.items() if name not in NO_PART_OF_RESULT}


def digest(config):
    """Twelve hexadecimal digits that name a run: of the SHA-256 of what determines its result."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_finished(run):
    """Whether a run folder has its summary."""
    return (Path(run) / SUMMARY).exists()


def has_diverged(run):
    """Whether a run folder's loss or gradient was not finite, which the same settings would only repeat."""
    return (Path(run) / NONFINITE).exists() and not is_finished(run)


def has_ended(run):
    """Whether a run folder's run needs no more work."""
    return is_finished(run) or has_diverged(run)


def last_step(run):
    """The step of a run folder's last record, 0 where there is none; reads the end of the file only."""
    path = Path(run) / METRICS
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            try:
                step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):  # being written, damaged, or without its beginning
                continue
            if isinstance(step, int):
                return step
    return 0
