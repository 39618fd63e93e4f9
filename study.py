"""A study: its file, its folder, how its runs stand, and the processes that work on them side by side.

    out/study_lr-quick/study.json                  the arms, grid, seeds and controls
    out/study_lr-quick/reduced,learning_rate=0.003/seed1/    a run folder of train.py, and its output in log.txt
    out/study_lr-quick/reduced,learning_rate=0.003/seed1.lock

A lock is an flock on its file, which the system lets go when the last process that holds it ends, however it ends. So
there are no stale locks on one machine. Between machines it needs a network file system that passes flock on (NFS from
version 4 does, Lustre with the mount option flock): where that is in doubt, give each machine a share of its own.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import configurator
import parallel
import runlog
from data import write_json
from train_config import NO_PART_OF_RESULT

FORMAT = 1
STATES = ("running", "failed", "diverged", "stopped", "finished", "not started")
STOPPED = (130, -2, -15)  # exit statuses of a run that Ctrl-C or SIGTERM ended
TAIL_BYTES = 1 << 16
POLL_SECONDS = 0.2


@dataclass
class Study:
    """What a study's file sets.

    In its texts {field} stands for a field's value as the files of the size and the command line set it, so that
    "{learning_rate}/2" and "--n_embd={n_embd}*31//32" suit any size.
    """

    arms: dict  # name -> arguments of train.py, as typed: "config/reduced_tied.py --attn_scale=1"
    control: str | dict  # the arm that all are compared with; or a dict: arm -> its own control
    grid: dict = field(default_factory=dict)  # field -> list of values, or dict: value -> arguments it brings along
    settings: str = ""  # arguments for all arms, after theirs
    seeds: tuple[int, ...] = (1, 2, 3)  # of the weights and the order of the data


def read_file(path):
    """The Study that a file describes; its control is a dict of all arms.

    Raises ValueError, naming the file, the line and the field, for a file that is no study.
    """
    values = configurator.read_config_file(path)
    if "arms" not in values or "control" not in values:
        raise ValueError(f"{path} sets no arms and control, so it is not a study: a study comes first, then its size")
    names = [each.name for each in dataclasses.fields(Study)]
    result = Study(**{configurator.known(name, names, where): value for name, (value, where) in values.items()})

    def require(is_right, name, what):
        if not is_right:
            raise ValueError(f"{values[name][1]}: {name} must be {what}, not {values[name][0]!r}")

    def is_dict(value, *kinds):
        return isinstance(value, dict) and value and all(isinstance(item, kinds) for item in value.values())

    arms = result.arms
    require(is_dict(arms, str), "arms", "a dict such as {'baseline': 'config/baseline_tied.py'}")
    require(all(re.fullmatch(r"[\w.+-]+", str(arm)) for arm in arms), "arms", "named by letters, digits and . + - _")
    if isinstance(result.control, str):
        result.control = dict.fromkeys(arms, result.control)
    require(is_dict(result.control, str), "control", "an arm, or a dict: arm -> its control")
    require({*result.control, *result.control.values()} <= {*arms}, "control", f"of the arms {', '.join(arms)}")
    result.control = {arm: result.control.get(arm, arm) for arm in arms}
    is_grid = is_dict(result.grid, list, tuple, dict) and all(result.grid.values())
    require(is_grid or result.grid == {}, "grid", "a dict: field -> list of values")
    require(isinstance(result.settings, str), "settings", "a text of arguments")
    where = values.get("seeds", (None, path))[1]
    result.seeds = check_seeds(configurator.coerce("seeds", result.seeds, tuple[int, ...], where), where)
    return result


def check_seeds(seeds, where):
    """seeds; raises ValueError unless there are some, each once."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: seeds must be given, each once, such as 1,2,3, not {','.join(map(str, seeds))!r}")
    return seeds


def read_study(folder):
    """The content of a study folder's study.json. Raises ValueError where there is none."""
    content = runlog.read_json(Path(folder) / "study.json")
    if content is None:
        raise ValueError(f"{folder} is not a study: it has no study.json, which sweep.py writes when it starts a study")
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder}/study.json is not of format {FORMAT}: it was written by another version")
    return content


def write_study(folder, content):
    """Write study.json, with the seeds of an earlier call on the same folder among its own, and in its command.

    Raises ValueError when the folder is that of another study: one that has no arm, at no point, in common.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = acquire(Path(folder) / "study.lock", wait=True)
    try:
        earlier = runlog.read_json(Path(folder) / "study.json") or content
        if not {entry["name"] for entry in earlier["arms"]} & {entry["name"] for entry in content["arms"]}:
            raise ValueError(f"{folder} holds another study ({earlier['command']}): give this one its own --out_dir=…")
        seeds = sorted({*earlier["seeds"], *content["seeds"]})
        command = content["command"]
        if set(seeds) != set(content["seeds"]):
            words = [word for word in shlex.split(command) if not word.startswith("--seeds=")]
            command = shlex.join([*words, f"--seeds={','.join(map(str, seeds))}"])
        write_json(Path(folder) / "study.json", {"format": FORMAT, **content, "command": command, "seeds": seeds})
    finally:
        os.close(lock)


def identity(config):
    """The fields of a resolved configuration, a dict, that determine a run's result."""
    return {name: value for name, value in config.items() if name not in NO_PART_OF_RESULT}


def digest(config):
    """Twelve hexadecimal digits that name a run: of the SHA-256 of what determines its result."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_folder(folder, name, seed):
    """Where the run of the arm called name with this seed is."""
    return Path(folder) / name / f"seed{seed}"


def lock_path(run):
    """The lock file of a run folder, beside it."""
    return Path(f"{run}.lock")


def acquire(path, wait=False):
    """The descriptor of the lock file at path, now locked by this process; None while another process has it.

    A child that inherits the descriptor holds the lock, too; closing it lets go. Raises ValueError on a file system
    without locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if _lock(descriptor, path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
        return descriptor
    os.close(descriptor)
    return None


def is_locked(path):
    """Whether some process holds the lock file at path."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, path, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor, path, operation):
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"cannot lock {path} ({error.strerror}): put the study on a file system with flock, with --out_dir=…"
        ) from error
    return True


def write_note(descriptor, **values):
    """Say in a locked file who works on its run (pid), or how that ended (exit_status)."""
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps({"host": socket.gethostname(), **values}) + "\n").encode(), 0)


def read_note(path):
    """What write_note left in a lock file; an empty dict where there is none, or only a part of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def has_failed(note):
    """Whether a lock file's note says that its run ended by itself before its end."""
    return note.get("exit_status", 0) not in (0, *STOPPED)


def is_finished(run):
    """Whether a run folder has its summary."""
    return (Path(run) / "summary.json").exists()


def has_diverged(run):
    """Whether a run folder's loss or gradient was not finite, which the same settings would only repeat."""
    return (Path(run) / "nonfinite.json").exists() and not is_finished(run)


def has_ended(run):
    """Whether a run folder's run needs no more work."""
    return is_finished(run) or has_diverged(run)


def state(run):
    """How the run in a run folder stands: one of STATES, from its files and its lock."""
    if is_finished(run):
        return "finished"
    if is_locked(lock_path(run)):
        return "running"
    if has_diverged(run):
        return "diverged"
    if has_failed(read_note(lock_path(run))):
        return "failed"
    return "stopped" if runlog.holds_run(run) else "not started"


def last_step(run):
    """The step of a run folder's last record, 0 where there is none; reads the end of the file only."""
    path = Path(run) / "metrics.jsonl"
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


@dataclass(eq=False)
class Worker:
    """A run's process."""

    run: object  # a sweep.Run
    lock: int  # the descriptor of the run's lock, which the process holds, too
    slot: int  # below the number of jobs; says which GPU
    process: subprocess.Popen


class Execution:
    """Works on runs (each a sweep.Run) until nothing is left to do; several may work on one study.

    jobs: processes side by side. gpus: names for CUDA_VISIBLE_DEVICES, of which each gets one; none: it is left alone.
    """

    def __init__(self, runs, jobs, gpus=()):
        self.runs, self.jobs, self.gpus = runs, jobs, gpus
        self.todo = list(runs)
        self.workers = []
        self.failed = {}  # run -> why
        # A failure from before is tried again; one that another execution meets meanwhile is not.
        self.old_notes = {run: read_note(lock_path(run.folder)) for run in runs}
        self.flops = {run: run.flops for run in runs}
        self.started, self.flops_at_start = time.monotonic(), self.flops_done()
        self.shown, self.shown_at = None, 0.0

    def execute(self, fail_fast=False):
        """Work until every run has ended, or, after a signal or with fail_fast a failure, until all are stopped.

        True: all are finished; None: a signal stopped it; otherwise `failed` and `diverged` say why.
        """
        stopping = False
        with parallel.StopSignal() as stop:
            try:
                while self.workers or (self.todo and not stopping):
                    self.reap(stopping)
                    if not stopping and (stop.requested or (fail_fast and self.failed)):
                        stopping = True
                        self.terminate()
                    if not stopping:
                        self.start()
                    self.show_progress()
                    time.sleep(POLL_SECONDS)
            except BaseException:  # the second Ctrl-C, say
                self.terminate()
                raise
        self.show_progress(last=True)
        return None if stop.requested else not (self.failed or self.diverged)

    def start(self):
        """Start runs while there are free slots; leave out what has ended and what another execution works on."""
        for run in list(self.todo):
            if has_ended(run.folder):
                self.todo.remove(run)
            elif len(self.workers) < self.jobs:
                run.folder.mkdir(parents=True, exist_ok=True)
                lock = acquire(lock_path(run.folder))
                if lock is None:
                    continue
                self.todo.remove(run)
                note = read_note(lock_path(run.folder))
                if has_ended(run.folder):  # by another execution, since we looked
                    os.close(lock)
                elif has_failed(note) and note != self.old_notes[run]:
                    os.close(lock)
                    self.failed[run] = f"exit status {note['exit_status']}, in another sweep"
                else:
                    self.workers.append(self.spawn(run, lock))

    @property
    def diverged(self):
        """The runs that diverged, now or before: they are not tried again."""
        return [run for run in self.runs if has_diverged(run.folder)]

    def spawn(self, run, lock):
        """Start a run's process. It inherits the lock, and so keeps it should this process be killed."""
        slot = min(set(range(self.jobs)) - {worker.slot for worker in self.workers})
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(run.command)}\n")
            log.flush()
            process = subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                process_group=0,  # Ctrl-C reaches this process alone, which then stops its runs
            )
        write_note(lock, pid=process.pid, started=runlog.now())
        return Worker(run, lock, slot, process)

    def reap(self, stopping):
        """Take in the runs that have ended."""
        for worker in list(self.workers):
            status = worker.process.poll()
            if status is None:
                continue
            self.workers.remove(worker)
            write_note(worker.lock, pid=worker.process.pid, exit_status=status, ended=runlog.now())
            os.close(worker.lock)
            if has_ended(worker.run.folder):
                continue
            if stopping and status in STOPPED:
                self.todo.append(worker.run)
            elif status < 0:
                self.failed[worker.run] = f"ended by {signal.Signals(-status).name}"
            else:
                self.failed[worker.run] = f"exit status {status}"

    def terminate(self):
        """Tell the runs to stop: they write a checkpoint first; told a second time, they stop at once."""
        for worker in self.workers:
            worker.process.terminate()

    def flops_done(self):
        """The training FLOPs of the steps that the run folders say are done."""
        return sum(flops * run.progress for run, flops in self.flops.items())

    def show_progress(self, last=False):
        """A line for the whole study: every second in a terminal, elsewhere when its counts have changed."""
        now, in_terminal = time.monotonic(), sys.stdout.isatty()
        if now < self.shown_at + 1 and not last:
            return
        elsewhere = sum(is_locked(lock_path(run.folder)) for run in self.todo)
        counts = {
            "running": len(self.workers),
            "running in other sweeps": elsewhere,
            "failed": len(self.failed),
            "diverged": len(self.diverged),
            "left": len(self.todo) - elsewhere,
        }
        done = len(self.runs) - sum(counts.values())
        line = f"{done} of {len(self.runs)} runs done" + "".join(f", {n} {name}" for name, n in counts.items() if n)
        if line == self.shown and not in_terminal:
            return
        self.shown, self.shown_at = line, now
        flops_done = self.flops_done()
        rate = (flops_done - self.flops_at_start) / max(1e-9, now - self.started)
        if rate > 0 and (self.workers or elsewhere):
            unfinished = [*self.todo, *(worker.run for worker in self.workers)]
            seconds = sum(self.flops[run] * (1 - run.progress) for run in unfinished) / rate
            line += f", {datetime.timedelta(seconds=round(seconds))} to go"
        if in_terminal:
            line = f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if in_terminal and not last else "\n", flush=True)
