"""Files of torch.save: whatever happened to one, it is refused in one line or has the content that was saved."""

import io
import json
import os
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import configurator
from engine import torch_file

CONTENT = {  # large and small tensors, an empty one, two that share memory, plain values
    "model": {"a": (a := torch.arange(3000.0)), "b": a[:4], "c": torch.zeros(0), "d": torch.ones(3).bfloat16()},
    "step": 7,
    "text": "ü",
}


@pytest.fixture(scope="module")
def saved():
    """The bytes that torch.save writes for CONTENT."""
    buffer = io.BytesIO()
    torch.save(CONTENT, buffer)
    return buffer.getvalue()


@pytest.fixture
def refused(tmp_path):
    """The message with which a file of these bytes is refused."""

    def check(content, name="ckpt.pt"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as refusal:
            torch_file.read(path)
        message = str(refusal.value)
        assert str(path) in message
        assert "\n" not in message
        assert "weights_only=False" not in message
        return message

    return check


def records(content):
    """(start, end) of the records in the bytes of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            lengths = np.frombuffer(content, "<u2", count=2, offset=record.header_offset + 26)
            start = record.header_offset + 30 + int(lengths.sum())
            yield start, start + record.file_size


def test_the_content_comes_back(tmp_path, saved):
    (tmp_path / "ckpt.pt").write_bytes(saved)
    for mmap in (False, True):
        content = torch_file.read(tmp_path / "ckpt.pt", mmap=mmap)
        assert (content["step"], content["text"]) == (7, "ü")
        for name, tensor in CONTENT["model"].items():
            assert torch.equal(content["model"][name], tensor)
        assert content["model"]["a"].data_ptr() == content["model"]["b"].data_ptr()


def test_every_flipped_bit_is_noticed(refused, saved):
    generator = random.Random(0)
    anywhere = generator.sample(range(8 * len(saved)), 200)
    inside = {position for start, end in records(saved) for position in range(start, end)}
    outside = [8 * p + generator.randrange(8) for p in range(len(saved)) if p not in inside]
    assert len(outside) > 1000  # headers, names, padding, checksums, the directory
    for bit in anywhere + generator.sample(outside, 400):
        content = bytearray(saved)
        content[bit // 8] ^= 1 << bit % 8
        assert "damaged" in refused(content)


def test_every_truncation_and_every_other_wound_is_noticed(refused, saved):
    generator = random.Random(1)
    n = len(saved)
    for length in {*range(1, 40), *range(n - 130, n), *generator.sample(range(n), 60)} - {0}:
        refused(saved[:length])
    (start, end) = max(records(saved), key=lambda record: record[1] - record[0])
    zeros = saved[: start + 512] + bytes(1024) + saved[start + 1536 :]
    moved = saved[: start + 512] + saved[start + 1024 : end] + saved[start + 512 : start + 1024] + saved[end:]
    for wounded in (zeros, moved, saved + b"\0", b"\0" + saved, saved + saved, saved[:start] + saved[end:]):
        assert "damaged" in refused(wounded)


def test_a_mapped_file_is_checked_but_for_its_tensors(tmp_path, saved):
    path = tmp_path / "ckpt.pt"
    first, *_ = records(saved)  # the pickle
    largest = max(records(saved), key=lambda record: record[1] - record[0])
    for position, is_noticed in ((first[0] + 50, True), (len(saved) - 8, True), (largest[0] + 50, False)):
        content = bytearray(saved)
        content[position] ^= 4
        path.write_bytes(content)
        if is_noticed:
            with pytest.raises(ValueError, match="is damaged"):
                torch_file.read(path, mmap=True)
        else:
            torch_file.read(path, mmap=True)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def as_saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def as_npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def as_torchscript():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"):
            archive.writestr(name, b"\x80\x02N.")
    return buffer.getvalue()


def as_zip_again():
    """The records of a checkpoint in an archive that another program wrote."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(as_saved({"a": 1}))) as archive, zipfile.ZipFile(buffer, "w") as other:
        for record in archive.infolist():
            other.writestr(record.filename, archive.read(record))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
        (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (lambda: b"not a checkpoint\n", "contains text"),
        (lambda: "ä".encode() * 400, "contains text"),
        (lambda: json.dumps({"model": [1, 2]}).encode(), "contains JSON"),
        (lambda: (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}', "is a safetensors file"),
        (lambda: pickle.dumps({"a": 1}), "is a pickle"),
        (lambda: pickle.dumps(Harmful()), "is a pickle"),
        (lambda: as_saved({"a": 1}, _use_new_zipfile_serialization=False), "PyTorch before 1.6"),
        (lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\3", "is compressed"),
        (lambda: bytes(4096), "begins with zeros"),
        (lambda: b"\x7fELF\2\1\1\0\0\0\xff\xff", "not a file that torch.save wrote"),
        (as_npz, "it has no data.pkl"),
        (as_torchscript, "TorchScript"),
        (as_zip_again, "is not what torch.save writes"),
        (lambda: as_saved({"a": Harmful()}), "contains the Python object posix.mkdir"),
        (lambda: as_saved(torch.nn.Linear(2, 2)), "the Python object torch.nn.modules.linear.Linear"),
        (lambda: as_saved({"a": np.zeros(3)}), "multiarray._reconstruct"),
        (lambda: as_saved({"a": np.datetime64("2020")}), "NumPy scalar of dtype M8"),
        (lambda: as_saved({"a": 1}, pickle_protocol=4), "something else than tensors and plain values"),
    ],
)
def test_a_file_of_another_kind_is_named(refused, monkeypatch, tmp_path, recwarn, content, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(content())
    assert not Path("unpickled").exists()
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


def test_a_file_without_checksums_is_refused(refused):
    torch.serialization.set_crc32_options(False)
    try:
        content = as_saved({"a": torch.zeros(2)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert "without checksums" in refused(content)


def test_a_path_without_a_checkpoint_says_what_is_there(tmp_path, saved):
    (tmp_path / "best.pt").write_bytes(saved)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for path, words in (
        ("ckpt.pt", ["there is no checkpoint", "are best.pt"]),
        ("empty/ckpt.pt", ["has no .pt files"]),
        ("nowhere/ckpt.pt", ["there is no folder"]),
        ("best.pt/ckpt.pt", ["best.pt is a file"]),
        ("", ["is a folder", "are best.pt"]),
        ("loop.pt", ["cannot read the checkpoint", "symbolic links"]),
        ("/dev/null", ["is a device"]),
    ):
        with pytest.raises(ValueError) as refusal:
            torch_file.read(tmp_path / path)
        for word in (str(tmp_path / path), *words):
            assert word in str(refusal.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, saved, monkeypatch):
    (tmp_path / "ckpt.pt").write_bytes(saved)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # root may read everything
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*ckpt.pt: Permission denied"):
        torch_file.read(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])  # of NumPy 2, of NumPy 1
def test_numpy_scalars_become_plain_numbers(tmp_path, monkeypatch, module):
    # torch.save asks for the name of the function that makes a scalar.
    monkeypatch.setattr(np._core.multiarray.scalar, "__module__", module, raising=False)
    scalars = [np.float64(3.25), np.float32(0.5), np.int64(-7), np.uint8(200), np.bool_(True), np.dtype(">f8").type(2)]
    torch.save(scalars, tmp_path / "ckpt.pt")
    assert module.encode() in (tmp_path / "ckpt.pt").read_bytes()
    numbers = torch_file.read(tmp_path / "ckpt.pt")
    assert numbers == [3.25, 0.5, -7, 200, True, 2.0]
    assert [type(number) for number in numbers] == [float, float, int, int, bool, float]


def test_nothing_else_reads_such_files():
    """torch.load anywhere else would run into what this file tests."""
    sources = [*configurator.ROOT.glob("*.py"), *configurator.ROOT.glob("[a-z]*/*.py")]
    callers = [path for path in sources if re.search(r"torch\.load\(", path.read_text(encoding="utf-8"))]
    assert [path.name for path in callers if path.parent.name != "tests"] == ["torch_file.py"]
