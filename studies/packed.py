"""The runs of a report in one small file, from which the report can be written anew: what results/ keeps of a study.

It has the configuration, facts and summary of each run in full, and of its metrics what a report shows: losses with
eight digits, training losses with five, diagnostics with four.
"""

import json
import lzma
from pathlib import Path

from engine import run_files
from engine.files import make_folder, read_json, write_atomically, write_json
from studies import store

NAME = "runs.json.xz"
FORMAT = 1
JSON_FILES = (run_files.CONFIG, run_files.FACTS, run_files.SUMMARY, run_files.NONFINITE)
DIGITS = {"eval": 8, "train": 5, "diagnostics": 4}  # of the numbers in each kind of record
LOSSES = {"eval": ("val_loss",), "train": ("loss",)}  # what a report shows of these; of the others all


def is_packed(folder):
    """Whether a folder has a report's runs in one file."""
    return (Path(folder) / NAME).exists()


def pack(folders, path):
    """Write the runs of a study's folder, or the run folders, of a report to the file at path.

    Raises ValueError for folders with one name, which would be one when they are unpacked.
    """
    study = store.read_study(folders[0]) if store.is_study(folders[0]) else None
    if study:
        names = [f"{entry['name']}/seed{seed}" for entry in study["arms"] for seed in study["seeds"]]
        runs = {name: _run(Path(folders[0], name)) for name in names}
    else:
        runs = {}
        for folder in folders:
            name = _name(folder)
            if name in runs:
                raise ValueError(f"two of the folders are called {name}: rename one, to pack them in one file")
            runs[name] = _run(Path(folder))
    content = {"format": FORMAT, "study": study, "runs": {name: run for name, run in runs.items() if run}}
    data = lzma.compress(json.dumps(content).encode(), preset=9 | lzma.PRESET_EXTREME)
    write_atomically(path, lambda file: file.write(data))


def unpack(path, folder):
    """Write the run folders in the file at path into folder; the folders to report, as report.py takes them.

    Raises ValueError for a file that is not one that pack wrote.
    """
    try:
        content = json.loads(lzma.decompress(Path(path).read_bytes()))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}")
        study, runs = content["study"], content["runs"].items()
    except (ValueError, TypeError, KeyError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a file that report.py --pack wrote: {error}") from error
    for name, run in runs:
        make_folder(Path(folder, name))
        for file, value in run.items():
            if file == run_files.METRICS:
                text = "".join(json.dumps(record) + "\n" for record in value)
                Path(folder, name, file).write_text(text, encoding="utf-8")
            else:
                write_json(Path(folder, name, file), value)
    if study:
        write_json(Path(folder, store.STUDY), study)
        return [str(folder)]
    return [str(Path(folder, name)) for name, _ in runs]


def _name(folder):
    """The name of a run folder in the file: the folder as it was given, or of one that is elsewhere its last parts."""
    parts = Path(folder).parts
    is_here = not Path(folder).is_absolute() and ".." not in parts
    return "/".join(parts if is_here else Path(folder).resolve().parts[-2:])


def _run(folder):
    """{file: content} of a run folder, {} where there is none."""
    found = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).exists()}
    if records := [_shown(record) for record in run_files.read_metrics(folder) if record["kind"] in DIGITS]:
        found[run_files.METRICS] = records
    return found


def _shown(record):
    """What a report shows of a record of metrics.jsonl."""
    digits = DIGITS[record["kind"]]
    names = LOSSES.get(record["kind"], record)
    return {name: _rounded(record[name], digits) for name in record if name in ("step", "kind", *names)}


def _rounded(value, digits):
    """A value of a record, numbers with at most so many digits."""
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
