"""The proof in tests/faults, in short: few trials of each kind survive, and what should not survive is noticed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the trials need fork, /proc and flock")

# Trials of each kind, so many that all take about ten seconds; results/reliability.md has many more.
SHORT = "kills=4 power_cuts=3 signals=3 double_starts=1 double_resumes=1 prepare_kills=2 prepare_power_cuts=2"
SHORT += " sweep_kills=1 full_disks=1 names=2 options=60 flips=60 truncations=60 steps=0 seed=1"


def run(code=("-m", "tests.faults"), **options):
    """Carry out trials in a process of their own, which forks them."""
    argv = [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *code, *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_few_trials_of_each_kind_survive(tmp_path):
    done = run(**dict(option.split("=") for option in SHORT.split()), out=tmp_path / "table.md")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 20
    for row in rows:
        fault, tried, survived, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert tried == survived, row


@pytest.mark.long
def test_memory_does_not_grow_over_ten_thousand_steps(tmp_path):
    done = run(only="steps", steps=10_000, out=tmp_path / "table.md")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_each_command_survives_full_disks_of_many_sizes(tmp_path):
    done = run(only="full_disks", full_disks=8, out=tmp_path / "table.md")
    assert done.returncode == 0, done.stdout + done.stderr


NO_SYNC = """
class NoSync:
    def __getattr__(self, name):
        return (lambda descriptor: None) if name == "fsync" else getattr(os, name)
"""
BROKEN = {  # what is broken -> (the trials that must notice it, how it is broken)
    "checkpoints are written in place": (
        dict(only="kills", kills=40),
        "checkpoint.write_atomically = lambda path, write: write(open(path, 'wb'))",
    ),
    "checkpoints are not flushed": (
        dict(only="power_cuts", power_cuts=20),
        "files.os = NoSync()",
    ),
    "metrics are not flushed": (
        dict(only="power_cuts", power_cuts=40),
        "run_files.os = NoSync()",
    ),
    "locks do not lock": (dict(only="double_starts", double_starts=8), "locks._lock = lambda *_, **__: True"),
    "wrong options are bugs": (dict(only="options", options=100), "configurator.ValueError = KeyError"),
}


@pytest.mark.long
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_noticed(tmp_path, what):
    options, patch = BROKEN[what]
    lines = [
        "import os, runpy",
        NO_SYNC,
        "import configurator",
        "from engine import checkpoint, files, locks, run_files",
    ]
    lines += [patch, "runpy.run_module('tests.faults', run_name='__main__', alter_sys=True)"]
    done = run(code=("-c", "\n".join(lines)), **options, out=tmp_path / "table.md")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Not survived" in (tmp_path / "table.md").read_text()


def after_a_power_cut(folder, work, rng=None):
    """path -> content of the files that a power cut leaves after work(), which is done in the folder `before`."""
    from faults import children
    from faults.disk import Disk
    from faults.events import FileEvents

    before, after = folder / "before", folder / "after"
    before.mkdir()
    (before / "old").write_text("old")

    def in_child():
        disk = Disk(before)
        FileEvents(before, disk=disk).install()
        work()
        disk.cut(str(after), rng)

    ended = children.outcome(children.start(in_child, before), before)
    assert ended.status == 0, ended.err
    return {str(path.relative_to(after)): path.read_text() for path in after.rglob("*") if path.is_file()}


def flush(path):
    """Flush a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def test_a_power_cut_loses_what_was_not_flushed(tmp_path):
    def work():
        os.mkdir("lost")
        os.mkdir("kept")
        for folder in ("lost", "kept"):
            Path(folder, "file").write_text("flushed")
            flush(f"{folder}/file")
            flush(folder)
        flush(".")
        os.mkdir("later")
        Path("later/file").write_text("its folder is not flushed")
        flush("later/file")
        flush("later")
        Path("new").write_text("its name is not flushed")
        flush("new")
        os.link("kept/file", "kept/other")
        os.unlink("lost/file")
        with open("kept/file", "a") as file:
            file.write(" and not flushed")
        Path("tmp").write_text("renamed")
        os.replace("tmp", "old")

    assert after_a_power_cut(tmp_path, work) == {"old": "old", "kept/file": "flushed", "lost/file": "flushed"}


def test_a_power_cut_keeps_what_was_flushed(tmp_path):
    def work():
        os.mkdir("folder")
        flush(".")
        Path("folder/tmp").write_text("new")
        flush("folder/tmp")
        os.replace("folder/tmp", "old")
        os.link("old", "other")
        os.unlink("other")
        flush(".")

    assert after_a_power_cut(tmp_path, work) == {"old": "new"}


def test_a_power_cut_may_keep_a_part(tmp_path):
    found = set()
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        rng = random.Random(seed)
        found.add(after_a_power_cut(tmp_path / str(seed), lambda: Path("old").write_text("new text"), rng)["old"])
    assert {"old", "new text"} <= found and len(found) > 4


def test_damage_to_a_report_is_noticed():
    from faults import names

    table = "| a | b |\n| --- | ---: |\n| {} | 1 |"
    for text, is_right in (("x", True), (r"x\|y", True), ("x|y", False), (r"x\\|y", False), ("x |\n| y", False)):
        assert (names.wrong_tables(table.format(text)) == []) == is_right, text
    assert names.Page("<p>&lt;b&gt;</p>").wrong == []
    assert names.Page("<p><script>x</script></p>").wrong and names.Page("<p onclick=x>y</p>").wrong
