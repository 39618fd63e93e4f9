"""The folder of a study: its study.json, the locks of its runs, and the state of each run.

    out/study_lr-quick/study.json                  the arms, grid, seeds and controls
    out/study_lr-quick/reduced,learning_rate=0.003/seed1/    a run folder of train.py, and its output in log.txt
    out/study_lr-quick/reduced,learning_rate=0.003/seed1.lock

Locks are those of engine/locks.py; where a network file system may not support them, let machines work on different
runs, as a job array does.
"""

import os
import shlex
from pathlib import Path

import configurator
from engine import locks, run_files
from engine.files import make_folder, read_json, write_json
from engine.signals import StopSignal
from studies.runs import COUNT, LIST, OBJECT, OPTIONAL_NUMBER, TEXT, check
from train_config import TrainConfig

FORMAT = 1
STUDY = "study.json"
STATES = ("running", "failed", "diverged", "stopped", "finished", "not started")
STOPPED = (StopSignal.BY_SIGNAL, StopSignal.BY_TIME, -2, -15)  # exit statuses of a run that was stopped


def is_study(folder):
    """Whether a folder is that of a study."""
    return (Path(folder) / STUDY).exists()


def read_study(folder):
    """The content of a study folder's study.json. Raises ValueError where there is none, or one that is no study."""
    path = Path(folder) / STUDY
    content = read_json(path)
    if content is None:
        raise ValueError(f"{folder} is not a study folder: it has no {STUDY}, which sweep.py writes when it starts")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {content.get('format')!r}: it was written by another "
            "version of sweep.py"
        )
    _check_study(path, content)
    return content


def _check_study(path, content):
    """Raise ValueError unless a study.json has what is read from it; values of options get their types."""
    kinds = configurator.field_types(TrainConfig)

    def options(values):
        return {
            configurator.known(name, kinds, path): configurator.coerce(name, value, kinds[name], path)
            for name, value in values.items()
        }

    check(path, content, {"name": TEXT, "command": TEXT, "seeds": LIST, "grid": OBJECT, "arms": LIST})
    later = {"tuning_seeds": [], "equal_within": None, "about": None}  # which came later than the others
    is_list = (lambda value: isinstance(value, list), "a list")
    optional = (lambda value: value is None or is_list[0](value), "a list or null")
    check(path, later | content, {"tuning_seeds": is_list, "equal_within": OPTIONAL_NUMBER, "about": optional})
    grid = content["grid"]
    for seed in content["seeds"]:
        check(path, {"seeds": seed}, {"seeds": COUNT})
    for name, values in grid.items():
        check(path, grid, {name: LIST})
        grid[name] = [options({name: value})[name] for value in values]
    for entry in content["arms"]:
        check(path, {"arms": entry}, dict.fromkeys(("arms.name", "arms.arm", "arms.control"), TEXT))
        check(path, {"arms": {"configured": {}} | entry}, {"arms.point": OBJECT, "arms.configured": OBJECT})
        if entry["point"].keys() != grid.keys():
            raise ValueError(f"{path}: the point of {entry['name']} must have the grid's fields, got {entry['point']}")
        entry |= {name: options(entry.get(name, {})) for name in ("point", "configured")}


def write_study(folder, content):
    """Write study.json; seeds that an earlier call on the same folder had stay in it, and in its command.

    Raises ValueError when the folder holds a different study: one with which it has no arm and point in common, or one
    with other tuning_seeds or another equal_within, which must be fixed before there are results.
    """
    make_folder(folder)
    lock = locks.acquire(Path(folder) / "study.lock", wait=True)
    try:
        earlier = read_study(folder) if is_study(folder) else content
        if not {entry["name"] for entry in earlier["arms"]} & {entry["name"] for entry in content["arms"]}:
            raise ValueError(
                f"{folder} already contains a different study ({earlier['command']}): choose another --out_dir=…"
            )
        for name in ("tuning_seeds", "equal_within"):
            before, now = earlier.get(name, content[name]), content[name]
            if before != now:
                raise ValueError(
                    f"{folder} was begun with {name}={before}, which is fixed before there are results, and its "
                    f"file has {now} now: set it back, or choose another --out_dir=…"
                )
        seeds = sorted({*earlier["seeds"], *content["seeds"]})
        command = content["command"]
        if set(seeds) != set(content["seeds"]):
            words = [word for word in shlex.split(command) if not word.startswith("--seeds=")]
            command = shlex.join([*words, f"--seeds={','.join(map(str, seeds))}"])
        write_json(Path(folder) / STUDY, {"format": FORMAT, **content, "command": command, "seeds": seeds})
    finally:
        os.close(lock)


def run_folder(folder, name, seed):
    """The folder of a run. name: of its arm and point, as in study.json."""
    return Path(folder) / name / f"seed{seed}"


def has_failed(note):
    """Whether a lock file's note says that its run exited with an error, rather than being stopped."""
    return note.get("exit_status", 0) not in (0, *STOPPED)


def state(run):
    """The state of the run in a run folder: one of STATES, from its files and its lock."""
    if run_files.is_finished(run):
        return "finished"
    if locks.is_locked(locks.lock_path(run)):
        return "running"
    if run_files.has_diverged(run):
        return "diverged"
    if has_failed(locks.read_note(locks.lock_path(run))):
        return "failed"
    return "stopped" if run_files.holds_run(run) else "not started"
