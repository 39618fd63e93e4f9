"""A run folder as a report reads it: its files, checked where they are read.

They may be damaged, or another program's: then one sentence says in which file, and what is missing or wrong.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import configurator
from engine import run_files
from engine.files import read_json
from train_config import NO_PART_OF_RESULT, TrainConfig


def is_number(value):
    """Whether a value is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# What an entry of a JSON file must be: (a function that says whether it is, the same in words).
COUNT = (lambda value: is_number(value) and isinstance(value, int) and value >= 0, "a whole number")
NUMBER = (lambda value: is_number(value) and math.isfinite(value), "a finite number")
OPTIONAL_NUMBER = (lambda value: value is None or NUMBER[0](value), "a finite number or null")
TEXT = (lambda value: isinstance(value, str), "text")
OPTIONAL_TEXT = (lambda value: value is None or isinstance(value, str), "text or null")
OBJECT = (lambda value: isinstance(value, dict), "a JSON object")
LIST = (lambda value: isinstance(value, list) and value, "a list that is not empty")

FACTS = {  # what a report needs of run.json; a dot leads into an object
    "parameters.total": COUNT,
    "parameters.attn_mlp": COUNT,
    "data.fingerprint": TEXT,
    "data.tokenizer": TEXT,
    "versions.torch": TEXT,
    "git_commit": OPTIONAL_TEXT,
    "device": TEXT,
}
SUMMARY = {
    "val_loss": NUMBER,
    "val_loss_se": OPTIONAL_NUMBER,
    "train_loss": OPTIONAL_NUMBER,
    "tokens_per_second": OPTIONAL_NUMBER,
    "bits_per_byte": OPTIONAL_NUMBER,  # where the bytes of the text are known
    "steps": COUNT,
    "tokens": COUNT,
}


@dataclass(frozen=True)
class Change:
    """An option that a resumed run changed."""

    option: str
    before: object
    after: object
    step: int  # the first one with the new value comes after it

    def __str__(self):
        before, after = (f"{v:.6g}" if isinstance(v, float) else str(v) for v in (self.before, self.after))
        return f"{self.option} {before} → {after} from step {self.step:,}"


@dataclass(eq=False)
class Run:
    """The files of a run folder, as train.py wrote them."""

    folder: Path
    config: dict  # the resolved configuration (config.json)
    facts: dict  # parameters, data, versions, device (run.json)
    summary: dict | None  # final losses, speed (summary.json); None while the run is not finished

    @cached_property
    def metrics(self):
        """The records of metrics.jsonl, in order."""
        return run_files.read_metrics(self.folder)

    @property
    def seed(self):
        """(seed, data_seed): runs of two arms with the same one are a pair."""
        return self.config["seed"], self.config["data_seed"]

    @property
    def experiment(self):
        """All options that determine the result, except the seeds: the runs of an arm have these in common."""
        options = run_files.identity(self.config)
        return {name: value for name, value in options.items() if name not in ("seed", "data_seed")}

    @property
    def precision(self):
        """The dtypes of its segments, in order: 'float32', or 'float32, bfloat16' if it was resumed with another."""
        segments = [segment["dtype"] for segment in self.facts.get("segments", []) if segment.get("dtype")]
        return ", ".join(dict.fromkeys(segments or [str(self.facts.get("dtype"))]))

    @property
    def date(self):
        """The day on which the run, or the last segment of it, was started, such as 2026-11-26; None: not known."""
        starts = [segment["start"] for segment in self.facts.get("segments", []) if "start" in segment]
        return starts[-1][:10] if starts else None

    @property
    def changes(self):
        """The Changes of options that determine the result, in order: config.json has only their last values.

        A segment that begins where an earlier one did repeats all its steps, and so replaces its changes.
        """
        found = []
        for segment in self.facts.get("segments", []):
            for name, (before, after) in segment.get("changed", {}).items():
                replaced = [each for each in found if each.option == name and each.step >= segment["step"]]
                found = [each for each in found if each not in replaced]
                before = replaced[0].before if replaced else before
                if name not in NO_PART_OF_RESULT and before != after:
                    found.append(Change(name, before, after, segment["step"]))
        return found

    @property
    def changes_text(self):
        """The changes in words: 'weight_decay 0.1 → 0.5 from step 200, …'; empty where there are none."""
        return ", ".join(map(str, self.changes))


def named(folder, base):
    """A run folder as a report names it: from the folder base, or as it is."""
    return os.path.relpath(folder, base) if base else folder


def read_run(folder):
    """The Run in a folder, or None where there is none. Raises ValueError for files that are not those of a run."""
    folder = Path(folder)
    config = read_config(folder / run_files.CONFIG)
    facts, summary = (read_json(folder / name) for name in (run_files.FACTS, run_files.SUMMARY))
    if config is None or facts is None:
        return None
    check(folder / run_files.FACTS, facts, FACTS)
    check(folder / run_files.FACTS, {"segments": []} | facts, {"segments": SEGMENTS})
    if summary is not None:
        check(folder / run_files.SUMMARY, {"bits_per_byte": None} | summary, SUMMARY)
    return Run(folder, config, facts, summary)


def read_config(path):
    """The options in a config.json, name -> value, or None where there is no such file.

    A run from before an option existed did what is now the option's default. Raises ValueError for options that no run
    can have.
    """
    stored = read_json(path)
    if stored is None:
        return None
    kinds = configurator.field_types(TrainConfig)
    known = {name: configurator.coerce(name, stored[name], kinds[name], path) for name in stored if name in kinds}
    try:
        return stored | dataclasses.asdict(TrainConfig(**known))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check(path, content, entries):
    """Raise ValueError, naming the file at path, unless its content has the entries: dotted name -> what it must be."""
    for name, (is_right, wanted) in entries.items():
        value = content
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{path} lacks {name}: it is damaged, or another program's")
            value = value[key]
        if not is_right(value):
            raise ValueError(f"{path}: {name} must be {wanted}, got {value!r}: it is damaged, or another program's")


def _is_segment(value):
    """Whether a value is a segment of run.json: one of the starts of a run, with the options that it changed."""
    changed = value.get("changed", {}) if isinstance(value, dict) else None
    return (
        isinstance(changed, dict)
        and OPTIONAL_TEXT[0](value.get("dtype"))
        and TEXT[0](value.get("start", ""))
        and all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values())
        and (not changed or COUNT[0](value.get("step")))
    )


SEGMENTS = (
    lambda value: isinstance(value, list) and all(map(_is_segment, value)),
    "a list of objects with start, step, dtype and changed (option: [before, after])",
)


def series(folder, records, kind, name):
    """step -> value of a metric in the records of one kind, in order; values that are null are left out.

    records: those of a run folder's metrics.jsonl. A value is a number, in diagnostics a list with one for each layer,
    and a diagnostic that was not recorded is as null. Raises ValueError, naming the file, for other values.
    """
    found = {}
    for record in records:
        if record["kind"] != kind:
            continue
        where = f"{Path(folder, run_files.METRICS)}: the {kind} record of step {record['step']}"
        if kind != "diagnostics" and name not in record:
            raise ValueError(f"{where} lacks {name}: it is damaged, or another program's")
        value = record.get(name)
        is_list = isinstance(value, list) and all(item is None or is_number(item) for item in value)
        if value is not None and not (is_list if kind == "diagnostics" else is_number(value)):
            wanted = "a list of numbers" if kind == "diagnostics" else "a number"
            raise ValueError(f"{where} must have {wanted} as {name}, got {value!r}: it is damaged")
        if value is not None:
            found[record["step"]] = value
    return found
