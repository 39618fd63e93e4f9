"""Wrong options of every command: no traceback, one line for each refusal, and no file written by a refused command."""

import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import traceback
import typing
import warnings
from pathlib import Path

import torch
from run_folders import write_study

import bench
import configurator
import cost
import eliminate
import prepare_owt
import report
import sample
import sweep
import train
from studies import workers
from train_config import TrainConfig

from . import children, full_disks, preparing, sweeping, training

SECONDS = 1.0  # after which a command counts as accepted
PATIENCE = 20  # seconds after which a trial that does not even notice that is killed
MEMORY = 3 * 2**30  # bytes that a trial may take
INTEGERS = "-1 0 1 2 3 7 64 320 -0 10**9 2**31 2**63 2**64 10**400 9**9**9 1e3 1.5 1e400 1/0 1%0 0x10 1_000 ٣".split()
NUMBERS = [*INTEGERS, *"0.5 -0.5 -0.0 1e-320 1e308 2**-5 nan inf -inf none True".split(), "1,2", "[1]", "", " ", "abc"]
NUMBERS += ["1\n2", "1 2", "--", "(", "()", "None", "'1'", "1j", "lambda: 0", "(" * 300, "-" * 3000, "1+" * 3000 + "1"]
BOOLEANS = ["True", "False", "true", "yes", "1", "0", "none", "", "Truee"]
TEXTS = [
    "",
    " ",
    "\n",
    "x" * 300,
    "a\nb",
    "名前",
    "\udcff",
    *"no/such/folder .. . ~ ~nobody/x /dev/null/x /proc/x".split(),
]
TEXTS += "data data/tiny data/tiny/train.bin run run/ckpt.pt run/config.json study new study.py texts/*".split()
TEXTS += "texts/0.jsonl * [ - | %s {} {n_embd} a:b a,b , none cuda:99 cpu:-1 meta cuda mps FILE: FILE:none".split()
TEXTS += (
    "FILE:run/ckpt.pt gpt2 bytes owner/x stdlib files openwebtext characters <|endoftext|> baseline scratch".split()
)
NOT_OPTIONS = ["", "\udcff", *"none.py study.py tiny.py -x -- ---x --=1 --nonsense --help=1 run".split()]
PYTHONS_OWN = ("values to unpack", "invalid literal", "could not convert", "domain error", "empty sequence")


class TooLong(BaseException):
    """The command was accepted, and is at work."""


def bases():
    """command -> (main, its dataclasses, arguments with which it ends soon)."""
    short = dict(max_iters=1, warmup_iters=0, eval_interval=1, save_steps=(1,), vocab_size=320)
    tiny = training.arguments(**short, out_dir="new")
    prepare = [argument for argument in preparing.ARGUMENTS if "out_dir" not in argument]
    study = ["study.py", "tiny.py", "--out_dir=new"]
    timing = ["--repeats=1", "--warmup=0", "--min_seconds=0", "--decode_prompt=2", "--decode_tokens=2"]
    return {
        "train": (train.main, [TrainConfig], tiny),
        "sample": (sample.main, [sample.SampleConfig], ["--out_dir=run", "--max_new_tokens=2", "--tokenizer=bytes"]),
        "sweep": (sweep.main, [sweep.SweepConfig, TrainConfig], study),
        "report": (report.main, [report.ReportConfig], ["study", "--out_dir=new"]),
        "bench": (bench.main, [bench.BenchConfig], [*tiny, *timing, "--only=loader"]),
        "cost": (cost.main, [TrainConfig], tiny),
        "eliminate": (
            eliminate.main,
            [eliminate.EliminateConfig],
            [*"--ckpt=run/ckpt.pt --out=new.pt --windows=2".split()],
        ),
        "prepare_owt": (prepare_owt.main, [prepare_owt.PrepareConfig], [*prepare, "--out_dir=new"]),
    }


def values(kind, rng):
    """A text for an option of this type, more often than not a wrong one."""
    kinds = configurator.alternatives(kind)
    kind = rng.choice(kinds)
    if typing.get_origin(kind) is tuple:
        return ",".join(values(typing.get_args(kind)[0], rng) for _ in range(rng.randint(0, 3)))
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice([*map(str, typing.get_args(kind)), *TEXTS])
    pool = {bool: BOOLEANS, int: NUMBERS, float: NUMBERS}.get(kind, TEXTS)
    return rng.choice(pool) if rng.random() < 0.9 else rng.choice(rng.choice([NUMBERS, BOOLEANS, TEXTS]))


def arguments(base, schemas, rng):
    """Arguments of a command: those of base, with one to three options more, and now and then something else."""
    kinds = {name: kind for schema in schemas for name, kind in configurator.field_types(schema).items()}
    chosen = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(kinds))
        chosen[name] = f"--{name}" if rng.random() < 0.05 else f"--{name}={values(kinds[name], rng)}"
    kept = [argument for argument in base if argument[2:].partition("=")[0] not in chosen]
    more = [rng.choice(NOT_OPTIONS)] if rng.random() < 0.05 else []
    if rng.random() < 0.03:
        kept = kept[rng.randint(0, len(kept)) :]
    return [*kept, *chosen.values(), *more]


def write_origin(folder):
    """What the commands work on: a dataset, a run, a study and its report's runs, texts."""
    full_disks.write_run(folder, vocab_size=320)
    write_study(folder / "study", {"baseline": {}, "reduced": {}}, lambda arm, seed: 3 + len(arm) + seed, seeds=(1, 2))
    preparing.write_texts(folder / "texts")
    (folder / "study.py").write_text(sweeping.STUDY)
    (folder / "tiny.py").write_text("\n".join(f"{name} = {value!r}" for name, value in sweeping.SIZE.items()))


def files_below(root):
    """path -> size and time of modification of all files; () of folders."""
    found = {}
    for folder, _, names in os.walk(root):
        found[folder] = ()
        for path in [os.path.join(folder, name) for name in names]:
            status = os.lstat(path)
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def prepare_worker(pipe):
    """Make this process one for trials: no network, little memory, an alarm, of which the reader of pipe hears."""
    resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY, resource.RLIM_INFINITY))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    report.draw = lambda *_: []  # seconds, each

    def refuse(*_, **__):
        raise OSError("no network in this trial")

    def too_long(*_, **__):
        os.write(pipe, b"[-1]\n")
        raise TooLong

    socket.getaddrinfo = socket.socket.connect = refuse
    workers.subprocess.Popen = too_long  # a sweep that starts its first run was accepted
    signal.signal(signal.SIGALRM, too_long)


def _size():
    """The virtual memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def trial(command, argv, root):
    """Run a command in this process; (what became of it, what is wrong)."""
    main, _, _ = bases()[command]
    before, streams = files_below(root), (io.StringIO(), io.StringIO())
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                configurator.run(main, list(argv))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit as stopped:
        status = stopped.code or 0
    except TooLong:
        return "accepted, too long", ""
    except BaseException as error:
        if isinstance(error.__context__, TooLong):  # the alarm came while a lock was being taken
            return "accepted, too long", ""
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
    errors = streams[1].getvalue()
    wrong = []
    if status in (0, 130):
        return "accepted", ""
    is_one_line = errors.startswith("error: ") and errors.count("\n") == 1
    if not (status in (1, 2) and is_one_line) and (status, command) != (1, "sweep"):
        wrong.append(f"status {status}, not one line: {errors[-300:]!r}")
    if status == 2 and (changed := files_below(root).items() ^ before.items()):
        names = sorted({os.path.relpath(path, root) for path, _ in changed})
        wrong.append(f"refused ({errors.strip()[:150]}), and wrote {', '.join(names[:4])}")
    if any(words in errors for words in PYTHONS_OWN):
        wrong.append(f"not our words: {errors.strip()[-300:]!r}")
    kind = "refused by a library or the system" if "(--debug" in errors else "refused"
    return kind if status == 2 else "failed", "; ".join(wrong)


def chosen(seed, number):
    """(command, arguments) of trial `number`, the same in each run of the program with this seed."""
    rng = random.Random(f"{seed}-{number}")
    every = bases()
    command = rng.choice(list(every))
    _, schemas, base = every[command]
    return command, arguments(base, schemas, rng)


def work(origin, root, seed, numbers, pipe):
    """Carry out the trials `numbers` in this process, and write a line of JSON about each into pipe."""
    prepare_worker(pipe)
    pristine = None
    place = root / "a/b"
    for number in numbers:
        os.write(pipe, (json.dumps([number]) + "\n").encode())
        if pristine is None or files_below(root) != pristine:
            os.chdir("/")
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(origin, place)
            os.environ["HOME"] = str(root / "home")
            pristine = files_below(root)
        os.chdir(place)
        command, argv = chosen(seed, number)
        os.write(pipe, (json.dumps([number, *trial(command, argv, root)]) + "\n").encode())


def wrong_options(folder, n, rng):
    """n trials of commands with wrong options, in workers that are forked anew where one ends or hangs.

    Yields (command and options, what is wrong, what became of it).
    """
    origin, seed, done = folder / "origin", rng.randrange(2**32), 0
    origin.mkdir()
    write_origin(origin)
    while done < n:
        reader, writer = os.pipe()
        numbers = range(done, n)
        pid = children.start(lambda: work(origin, folder / "root", seed, numbers, writer), folder, seconds=0)  # noqa: B023
        os.close(writer)
        is_late = False
        for message in messages(reader):
            is_late = message == [-1] or message is None
            if message is None:
                os.kill(pid, signal.SIGKILL)
            elif len(message) > 1:
                number, kind, wrong = message
                done = number + 1
                yield " ".join(map(repr, chosen(seed, number))), wrong, kind
        os.close(reader)
        ended = children.outcome(pid, folder)
        if done < n:  # the alarm raises an exception in the middle of anything, and C++ may not survive that
            what = "" if is_late else f"the process ended ({ended.describe()})"
            yield " ".join(map(repr, chosen(seed, done))), what, "accepted, too long"
            done += 1


def messages(descriptor):
    """The JSON values that come through a pipe, one per line; None where nothing comes for PATIENCE seconds."""
    rest = b""
    while True:
        if not select.select([descriptor], [], [], PATIENCE)[0]:
            yield None
        part = os.read(descriptor, 2**16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from map(json.loads, lines)
