"""The processes that work on the runs of a study, side by side."""

import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from engine import devices, locks, run_files, signals
from engine.files import make_folder, reason
from studies import store
from studies.plan import PlannedRun

POLL_SECONDS = 0.2


def add_line(path, line):
    """Add a line to a text file; where that fails, why, as text."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
    except OSError as error:
        return f"cannot write {path}: {reason(error)}"
    return None


@dataclass(eq=False)
class Worker:
    """A process that carries out a run."""

    run: PlannedRun
    lock: int  # the descriptor of the run's lock, which the process holds, too
    slot: int  # from 0, below the number of jobs; decides which GPU
    process: subprocess.Popen


class Execution:
    """Carries out PlannedRuns, `jobs` of them at a time; several executions may work on one study.

    gpus: names for CUDA_VISIBLE_DEVICES, of which each process gets one; empty: the variable is not changed. choice: a
    tuning.Choice; runs that it does not need leave `runs` once that is known.
    """

    def __init__(self, runs, jobs, gpus=(), choice=None):
        self.runs, self.gpus, self.choice = list(runs), gpus, choice
        self.todo = list(runs)
        n_left = sum(not run_files.has_ended(run.folder) for run in runs)
        self.jobs = max(1, min(jobs, n_left))  # fewer runs than cores: more threads for each
        self.workers = []
        self.failed = {}  # run -> why
        # A run that had failed before is tried again; one that fails meanwhile in another execution is not.
        self.old_notes = {run: locks.read_note(locks.lock_path(run.folder)) for run in runs}
        shares = choice.shares(runs) if choice else dict.fromkeys(runs, 1)
        self.flops = {run: run.flops * shares[run] for run in runs}
        self.started, self.flops_at_start = time.monotonic(), self.flops_done()
        self.shown, self.shown_at = None, 0.0

    def execute(self, fail_fast=False, stop=None):
        """Work until every run has ended, or all are stopped: by stop, or with fail_fast by the first failure.

        stop: a signals.StopSignal. True: all are finished; None: it stopped them; False: `failed` and `diverged` say
        which are not finished.
        """
        stopping = False
        with stop or signals.StopSignal() as stop:
            try:
                while self.workers or (self.todo and not stopping):
                    self.reap(stopping)
                    if not stopping and (stop.requested or (fail_fast and self.failed)):
                        stopping = True
                        self.terminate()
                    if not stopping:
                        self.start()
                    self.show_progress()
                    if self.blocked:
                        break
                    time.sleep(POLL_SECONDS)
            except BaseException:  # a second Ctrl-C, for example
                self.terminate()
                raise
        self.show_progress(last=True)
        return None if stop.requested and self.todo else not (self.failed or self.diverged or self.todo)

    def start(self):
        """Start runs while there are free slots; skip those that have ended and those of other executions."""
        for run in list(self.todo):
            if run_files.has_ended(run.folder):
                self.todo.remove(run)
            elif len(self.workers) < self.jobs and not self.waits_for(run):
                if self.choice and not self.choice.needs(run.name, run.seed):
                    self.todo.remove(run)
                    self.runs.remove(run)
                    continue
                self.flops[run] = run.flops
                make_folder(run.folder)
                lock = locks.acquire(locks.lock_path(run.folder))
                if lock is None:
                    continue
                self.todo.remove(run)
                note = locks.read_note(locks.lock_path(run.folder))
                if run_files.has_ended(run.folder):  # by another execution, since we looked
                    os.close(lock)
                elif store.has_failed(note) and note != self.old_notes[run]:
                    os.close(lock)
                    self.failed[run] = f"exit status {note['exit_status']}, in another sweep"
                else:
                    self.workers.append(self.spawn(run, lock))

    def waits_for(self, run):
        """The folders of the runs that must end before it is known whether a run is needed."""
        return self.choice.waits_for(run.name, run.seed) if self.choice else []

    @property
    def blocked(self):
        """Whether all that is left waits for runs that nobody works on, since they failed, or another job has them."""
        if self.workers or not self.todo:
            return False
        awaited = [self.waits_for(run) for run in self.todo]
        return all(awaited) and not any(
            locks.is_locked(locks.lock_path(folder)) for folder in {folder for folders in awaited for folder in folders}
        )

    @property
    def diverged(self):
        """The runs that diverged, now or earlier: they are not tried again."""
        return [run for run in self.runs if run_files.has_diverged(run.folder)]

    def spawn(self, run, lock):
        """Start a run's process. It inherits the lock, and so keeps it if this process is killed."""
        slot = min(set(range(self.jobs)) - {worker.slot for worker in self.workers})
        environment = {**os.environ, locks.INHERITED: str(lock)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, devices.available_cpus() // self.jobs)))
        if trouble := add_line(run.log, f"$ {shlex.join(run.command)}"):
            raise ValueError(f"{trouble}; repeat the command to continue")
        with open(run.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                process_group=0,  # Ctrl-C reaches this process alone, which then stops its runs
            )
        locks.write_note(lock, pid=process.pid, started=locks.now())
        return Worker(run, lock, slot, process)

    def reap(self, stopping):
        """Note the processes that have ended, and release their locks."""
        for worker in list(self.workers):
            status = worker.process.poll()
            if status is None:
                continue
            self.workers.remove(worker)
            locks.write_note(worker.lock, pid=worker.process.pid, exit_status=status, ended=locks.now())
            os.close(worker.lock)
            if run_files.has_ended(worker.run.folder):
                continue
            if stopping and status in store.STOPPED:
                self.todo.append(worker.run)
            elif status < 0:
                self.failed[worker.run] = f"killed by {signal.Signals(-status).name}"
            else:
                self.failed[worker.run] = f"exit status {status}"
            if worker.run in self.failed and (trouble := add_line(worker.run.log, f"# {self.failed[worker.run]}")):
                self.failed[worker.run] += f" ({trouble})"  # which the run could not say there, either

    def terminate(self):
        """Tell the runs to stop. They write a checkpoint first; told a second time, they stop at once."""
        for worker in self.workers:
            worker.process.terminate()

    def flops_done(self):
        """The training FLOPs of the steps that the run folders show as done."""
        return sum(flops * run.progress for run, flops in self.flops.items())

    def show_progress(self, last=False):
        """Print one line for all runs: every second in a terminal, elsewhere whenever its counts change."""
        now, in_terminal = time.monotonic(), sys.stdout.isatty()
        if now < self.shown_at + 1 and not last:
            return
        elsewhere = sum(locks.is_locked(locks.lock_path(run.folder)) for run in self.todo)
        counts = {
            "running": len(self.workers),
            "running in other sweeps": elsewhere,
            "failed": len(self.failed),
            "diverged": len(self.diverged),
            "waiting": len(self.todo) - elsewhere,
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
