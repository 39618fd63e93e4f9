"""The files of a run folder: their names, what they say of the run, and what names a run."""

import hashlib
import json
from pathlib import Path

from train_config import NO_PART_OF_RESULT

CONFIG = "config.json"  # the resolved configuration
FACTS = "run.json"  # what else a run is: parameters, data, commit, versions, device, segments
METRICS = "metrics.jsonl"  # one JSON object per line
CHECKPOINT, BEST = "ckpt.pt", "best.pt"  # the latest, and that with the best validation loss
SUMMARY = "summary.json"  # marks a run as finished
NONFINITE = "nonfinite.json"  # the step at which a run diverged
RUN_FILES = (CONFIG, FACTS, METRICS, CHECKPOINT, SUMMARY)
TAIL_BYTES = 1 << 16  # of metrics.jsonl, in which the last record surely is


def holds_run(folder):
    """Whether a folder holds a run, finished or not."""
    return any((Path(folder) / name).exists() for name in RUN_FILES)


def read_metrics(folder):
    """The records of a run folder's metrics.jsonl, in order; a last line that a kill cut short is left out."""
    path = Path(folder) / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


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
                return json.loads(line)["step"]
            except ValueError:  # a line that is being written, or whose beginning was cut off
                continue
    return 0
