"""What the installed W&B wrote offline, read back from its own file."""

import struct
from pathlib import Path

import pytest

import sweep
import train
from engine.files import read_json

wandb = pytest.importorskip("wandb")
BLOCK = 32768  # bytes of W&B's file, a log of LevelDB's form after a header of 7 bytes


def records(path):
    """The protocol-buffer records of an offline run."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_run(folder):
    """(the run record, its summary, the history rows) of the only offline run under a folder."""
    (path,) = folder.rglob("*.wandb")
    run, summary, history, files = None, {}, [], []
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "summary":
            summary |= {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
        elif kind == "history":
            history.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
        elif kind == "artifact":
            files += [entry.path for entry in record.artifact.manifest.contents]
    return run, summary, history, files


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_a_run_is_there_with_what_it_is(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    summary = train.train(tiny(wandb_log=True, wandb_artifacts=True, wq_identity=True, max_iters=10))
    run, found, history, files = offline_run(tmp_path / "elsewhere")
    config = {item.key: item.value_json for item in run.config.update}
    assert {"learning_rate", "parameters", "git_commit", "device", "versions"} <= config.keys()
    assert str(read_json("run/run.json")["parameters"]["total"]) in config["parameters"]
    assert list(run.tags) == ["tiny", "W_Q = I", "2 x 16"]
    assert (run.job_type, run.run_group) == ("train", read_json("run/run.json")["wandb_id"])
    assert float(found["val_loss"]) == pytest.approx(summary["val_loss"])
    assert {row["step"] for row in history if "train/loss" in row} == {str(step) for step in range(1, 11)}
    assert any("evaluations" in key for row in history for key in row)
    assert any("loss curve" in key for row in history for key in row)
    assert {"ckpt.pt", "best.pt"} <= set(files)
    assert not list(Path("run").rglob("*.wandb"))


@pytest.mark.slow
def test_the_runs_of_an_arm_are_a_group(tiny, tmp_path):
    from conftest import TINY

    Path("size.py").write_text("\n".join(f"{name} = {value!r}" for name, value in {**TINY, "max_iters": 4}.items()))
    Path("study.py").write_text('arms = {"a": "--attn_scale=1", "b": "--attn_scale=0.5"}\ncontrol = "a"\nseeds = [1]\n')
    status = sweep.main(["study.py", "size.py", "--wandb_log", "--jobs=1", "--out_dir=out/mine"])
    assert status == 0
    for arm in ("a", "b"):
        run, *_ = offline_run(Path(f"out/mine/{arm}"))
        assert run.run_group == f"mine/{arm}"
        assert run.display_name == f"mine/{arm}/seed1"
        assert "mine" in run.tags
