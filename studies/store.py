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

from engine import locks, run_files
from engine.files import read_json, write_json

FORMAT = 1
STUDY = "study.json"
STATES = ("running", "failed", "diverged", "stopped", "finished", "not started")
STOPPED = (130, -2, -15)  # exit statuses of a run that Ctrl-C or SIGTERM stopped


def is_study(folder):
    """Whether a folder is that of a study."""
    return (Path(folder) / STUDY).exists()


def read_study(folder):
    """The content of a study folder's study.json. Raises ValueError where there is none."""
    content = read_json(Path(folder) / STUDY)
    if content is None:
        raise ValueError(f"{folder} is not a study folder: it has no {STUDY}, which sweep.py writes when it starts")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{folder}/{STUDY} must have format {FORMAT}, got {content.get('format')!r}: it was written by another "
            "version of sweep.py"
        )
    return content


def write_study(folder, content):
    """Write study.json; seeds that an earlier call on the same folder had stay in it, and in its command.

    Raises ValueError when the folder holds a different study: one with which it has no arm and point in common.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = locks.acquire(Path(folder) / "study.lock", wait=True)
    try:
        earlier = read_json(Path(folder) / STUDY) or content
        if not {entry["name"] for entry in earlier["arms"]} & {entry["name"] for entry in content["arms"]}:
            raise ValueError(
                f"{folder} already contains a different study ({earlier['command']}): choose another --out_dir=…"
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
