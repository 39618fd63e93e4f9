"""Packed bins: the same bytes come out, and a file that holds anything else is refused with nothing left behind."""

import io
import json
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import write_dataset

import data
import prepare_owt
from configurator import ROOT
from corpus import packing
from engine.files import sha256_of

NAMES = ("meta.json", "train.bin", "val.bin")


@pytest.fixture
def packed(tmp_path, command):
    """A function that packs a small dataset, and gives the path of the file."""
    write_dataset(tmp_path / "bins", n_train=30_000, n_val=2000)
    path = tmp_path / "bins.tar.xz"
    assert command(prepare_owt.main, f"--pack={path}", f"--out_dir={tmp_path / 'bins'}")[0] == 0
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def archive(entries, **options):
    """The bytes of an xz-compressed tar file with entries, each (TarInfo or name, content)."""
    buffer = io.BytesIO()
    with lzma.open(buffer, "wb") as stream, tarfile.open(fileobj=stream, mode="w|", **options) as tar:
        for entry, body in entries:
            entry = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            entry.size = len(body) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def test_what_is_unpacked_is_what_was_packed(packed, tmp_path, command):
    status, out, _ = command(prepare_owt.main, f"--unpack={packed}", f"--out_dir={tmp_path / 'out' / 'new'}")
    assert status == 0
    assert content(tmp_path / "out/new") == content(tmp_path / "bins")
    assert sha256_of(tmp_path / "bins/train.bin") in out and "train on it: python " in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["new"]
    bins = [data.load_bins(tmp_path, name) for name in ("bins", "out/new")]
    assert bins[0].fingerprint == bins[1].fingerprint


def test_it_is_a_plain_tar_xz_file_and_does_not_depend_on_the_number_of_threads(packed, tmp_path, monkeypatch):
    with tarfile.open(packed, "r:xz") as tar:
        assert tar.getnames() == list(NAMES)
        assert {name: tar.extractfile(name).read() for name in NAMES} == content(tmp_path / "bins")
    packing.pack(tmp_path / "bins", tmp_path / "again.tar.xz", n_workers=3)
    assert packed.read_bytes() == (tmp_path / "again.tar.xz").read_bytes()
    monkeypatch.setattr(packing, "PIECE", 7001)  # many streams in a row
    packing.pack(tmp_path / "bins", tmp_path / "pieces.tar.xz", n_workers=2)
    packing.unpack(tmp_path / "pieces.tar.xz", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "bins")


NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def test_a_machine_without_a_network_needs_nothing_else(packed, tmp_path):
    """An empty home, no cache, no tokenizer."""
    home, site = tmp_path / "home", tmp_path / "site"
    home.mkdir()
    site.mkdir()
    hidden = ("tiktoken", "gigatoken", "datasets", "huggingface_hub", "wandb")
    modules = f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n"
    (site / "sitecustomize.py").write_text(NO_NETWORK + modules)
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_owt.py", f"--unpack={packed}", "--out_dir=data/there"],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(site)},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert content(home / "data/there") == content(tmp_path / "bins")
    assert [path.name for path in home.iterdir()] == ["data"]


def test_unpacking_again_changes_nothing_and_other_bins_are_not_overwritten(packed, tmp_path, refuses, command):
    call = (prepare_owt.main, f"--unpack={packed}", f"--out_dir={tmp_path / 'out'}")
    assert command(*call)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command(*call)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/val.bin").unlink()  # as a kill between two names would leave it
    assert command(*call)[0] == 0
    assert content(tmp_path / "out") == content(tmp_path / "bins")
    (tmp_path / "out/meta.json").unlink()
    refuses(*call, words=[tmp_path / "out", "holds other bins"])
    shutil.rmtree(tmp_path / "out")
    write_dataset(tmp_path / "out", seed=1)
    other = content(tmp_path / "out")
    refuses(*call, words=[tmp_path / "out", "holds other bins"])
    assert content(tmp_path / "out") == other


def link(name, target="/etc/passwd", kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def entries(folder, **changes):
    """The entries of a packed folder, with some contents changed."""
    return [(name, {**content(folder), **changes}[name]) for name in NAMES]


def changed(good, name, make):
    """The entries of a sound archive, with the content of one file changed."""
    return [(each, make(body) if each == name else body) for each, body in good]


TRICKS = {  # what is wrong -> (the entries of the archive, given those of a sound one; words of the message)
    "a path upwards": (lambda good: [("../evil", b"x"), *good], ["meta.json next", "'../evil'"]),
    "an absolute path": (lambda good: [good[0], ("/tmp/evil", b"x")], ["train.bin next", "'/tmp/evil'"]),
    "a folder before": (lambda good: [(f"./{name}", body) for name, body in good], ["meta.json next"]),
    "a link": (lambda good: [good[0], (link("train.bin"), b""), good[2]], ["train.bin next"]),
    "a hard link": (lambda good: [good[0], (link("train.bin", kind=tarfile.LNKTYPE), b"")], ["train.bin next"]),
    "a device": (lambda good: [good[0], (link("train.bin", kind=tarfile.CHRTYPE), b"")], ["train.bin next"]),
    "another file behind": (lambda good: [*good, ("evil", b"x")], ["more in it"]),
    "another order": (lambda good: [good[1], good[0], good[2]], ["meta.json next"]),
    "a bin missing": (lambda good: good[:2], ["damaged"]),
    "a long name": (lambda good: [("a/" * 200 + "evil", b"x"), *good], ["meta.json next"]),
    "a bin too long": (lambda good: changed(good, "train.bin", lambda body: body + b"xx"), ["have the size"]),
    "a bin too short": (lambda good: changed(good, "train.bin", lambda body: body[2:]), ["have the size"]),
    "other tokens": (lambda good: changed(good, "train.bin", lambda body: bytes(len(body))), ["SHA-256"]),
    "no manifest in it": (lambda good: changed(good, "meta.json", lambda _: b"[]"), ["meta.json"]),
    "no JSON": (lambda good: changed(good, "meta.json", lambda _: b"{"), ["damaged"]),
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_an_archive_of_anything_else_is_refused_and_leaves_nothing(packed, tmp_path, refuses, trick):
    make, words = TRICKS[trick]
    path = tmp_path / "bad.tar.xz"
    path.write_bytes(archive(make(entries(tmp_path / "bins")), format=tarfile.GNU_FORMAT))
    before = sorted(tmp_path.rglob("*"))
    refuses(prepare_owt.main, f"--unpack={path}", f"--out_dir={tmp_path / 'out' / 'x'}", words=[path.name, *words])
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


def test_counts_that_are_no_counts_are_refused(packed, tmp_path, refuses):
    path = tmp_path / "bad.tar.xz"
    for tokens in (-1, 2**70, "x", 1.5, True, None):
        manifest = json.loads((tmp_path / "bins/meta.json").read_text())
        manifest["splits"]["train"]["tokens"] = tokens
        path.write_bytes(archive(entries(tmp_path / "bins", **{"meta.json": json.dumps(manifest).encode()})))
        refuses(prepare_owt.main, f"--unpack={path}", f"--out_dir={tmp_path / 'out'}", words=[])
        assert not (tmp_path / "out").exists()


def test_damage_anywhere_is_refused_and_leaves_nothing(packed, tmp_path, command):
    sound, rng = packed.read_bytes(), random.Random(1)
    path, out = tmp_path / "bad.tar.xz", tmp_path / "out"
    places = [0, 3, 10, len(sound) - 1, len(sound) - 20, *(rng.randrange(len(sound)) for _ in range(40))]
    spoilt = [sound[:n] for n in (0, 1, 20, len(sound) // 2, len(sound) - 1)]
    spoilt += [sound[:i] + bytes([sound[i] ^ (1 << rng.randrange(8))]) + sound[i + 1 :] for i in places]
    for bad in [*spoilt, b"not xz at all", packed.read_bytes()[::-1]]:
        path.write_bytes(bad)
        status, _, error = command(prepare_owt.main, f"--unpack={path}", f"--out_dir={out}")
        assert status == 2 and error.count("\n") == 1 and path.name in error, error
        assert not out.exists()


def test_a_small_file_that_would_fill_the_disk_is_refused_before_it_does(packed, tmp_path, refuses):
    manifest = json.loads((tmp_path / "bins/meta.json").read_text())
    manifest["splits"]["train"]["tokens"] = 10**15
    path = tmp_path / "bomb.tar.xz"
    path.write_bytes(archive(entries(tmp_path / "bins", **{"meta.json": json.dumps(manifest).encode()})))
    refuses(prepare_owt.main, f"--unpack={path}", f"--out_dir={tmp_path / 'out'}", words=["too little space"])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_and_can_be_tried_again(packed, tmp_path, refuses, command):
    call = (prepare_owt.main, f"--unpack={packed}", f"--out_dir={tmp_path / 'out'}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        refuses(*call, words=["no space left"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert command(*call)[0] == 0


def test_bins_that_are_not_those_of_their_manifest_are_not_packed(packed, tmp_path, refuses):
    call = (prepare_owt.main, f"--pack={tmp_path / 'new.tar.xz'}", f"--out_dir={tmp_path / 'bins'}")
    path = tmp_path / "bins/val.bin"
    sound = path.read_bytes()
    for bad in (sound[:-2], sound + b"xx", b"x" * len(sound)):
        path.write_bytes(bad)
        refuses(*call, words=[path, "prepare it again"])
    path.write_bytes(sound)
    (tmp_path / "bins/meta.json").unlink()
    refuses(*call, words=["has no meta.json"])
    assert not (tmp_path / "new.tar.xz").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pack=a", "--unpack=a", "--out_dir=x"], ["give one of them"]),
        (["--pack=a", "--verify"], ["give one of them"]),
        (["--unpack=a"], ["--unpack needs --out_dir"]),
        (["--unpack=none.tar.xz", "--out_dir=x"], ["none.tar.xz"]),
    ],
)
def test_mistakes_in_the_options_are_one_line(tmp_path, monkeypatch, refuses, options, words):
    monkeypatch.chdir(tmp_path)
    refuses(prepare_owt.main, *options, words=words)
    assert list(tmp_path.iterdir()) == []
