"""Several processes: the run of one, resumed from one to two and back; micro-batches that shrink; recomputation."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine import checkpoint, devices, distributed, run_files
from engine.files import read_json
from model import GPTConfig

STEPS = 20
SCHEDULE = dict(max_iters=STEPS, eval_interval=10, batch_size=2, dtype="float32", weight_decay=0.1)


def losses(folder):
    """Training losses and gradient norms of each step, then validation losses, of a run folder."""
    records = run_files.read_metrics(folder)
    train_records = [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]
    assert len(train_records) == STEPS
    return np.array(train_records), np.array([r["val_loss"] for r in records if r["kind"] == "eval"])


def test_two_processes_are_the_run_of_one_sharded_or_not_and_go_on_from_each_other(tiny):
    whole = tiny(out_dir="one", wq_identity=True, attn_scale=0.5, **SCHEDULE)
    half = dict(max_iters=STEPS // 2, lr_decay_iters=STEPS)
    train.train(whole)
    train.train(dataclasses.replace(whole, out_dir="one-then-ddp", **half))
    shutil.copytree("one-then-ddp", "one-then-full")
    runs = [
        dict(out_dir="ddp"),
        dict(out_dir="full", shard="full"),
        dict(out_dir="one-then-ddp", resume=True, lr_decay_iters=STEPS),
        dict(out_dir="one-then-full", resume=True, lr_decay_iters=STEPS, shard="full"),
        dict(out_dir="ddp-then-one", **half),
        dict(out_dir="full-then-one", shard="full", **half),
    ]
    options = dataclasses.asdict(whole)
    Path("runs.json").write_text(json.dumps([{**options, **changes} for changes in runs]))
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run(
        [*command, str(script), "runs.json"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "deprecated" not in result.stderr
    assert "2 × 2 sequences of 16 in each of 2 processes" in result.stdout
    for folder in ("ddp-then-one", "full-then-one"):
        train.train(dataclasses.replace(whole, out_dir=folder, resume=True, lr_decay_iters=STEPS))

    expected = losses("one")
    for folder in ("ddp", "full", "one-then-ddp", "one-then-full", "ddp-then-one", "full-then-one"):
        for mine, other in zip(losses(folder), expected, strict=True):
            np.testing.assert_allclose(mine, other, rtol=2e-4, err_msg=folder)
        state, reference = (checkpoint.load(f"{name}/ckpt.pt") for name in (folder, "one"))
        for name, tensor in reference["model"].items():
            torch.testing.assert_close(state["model"][name], tensor, rtol=1e-3, atol=1e-4)
        for index, entry in reference["optimizer"]["state"].items():
            assert state["optimizer"]["state"][index]["exp_avg"].shape == entry["exp_avg"].shape
        assert read_json(f"{folder}/summary.json")["windows"] == 31


def before_2_13(module, device_ids=None, broadcast_buffers=True, gradient_as_bucket_view=False):
    return {"broadcast_buffers": broadcast_buffers}


def since_2_13(
    module, device_ids=None, broadcast_buffers=None, gradient_as_bucket_view=False, forward_sync_buffers=None
):
    return {"broadcast_buffers": broadcast_buffers, "forward_sync_buffers": forward_sync_buffers}


@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        (before_2_13, {"broadcast_buffers": False}),
        (since_2_13, {"broadcast_buffers": None, "forward_sync_buffers": False}),
    ],
)
def test_buffers_are_not_sent_around_in_any_version_of_torch(monkeypatch, wrapper, expected):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", wrapper)
    world = distributed.World(rank=0, size=2)
    assert distributed.wrap_model(None, False, "none", world, torch.device("cpu")) == expected


def test_a_batch_that_does_not_divide_among_processes_is_refused(tiny):
    assert tiny(batch_size=2).sequences_per_process(2) == 4
    with pytest.raises(
        ValueError, match=r"not divisible by processes × batch_size × block_size = 96 \(nearest: 96, 192"
    ):
        tiny(batch_size=2).sequences_per_process(3)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tiny, monkeypatch, capsys):
    expected = train.train(tiny(out_dir="plain"))
    original, sizes = train.Trainer.update, []

    def too_large(trainer, x, y, between):
        sizes.append(trainer.batch_size)
        if trainer.batch_size > 2 and len(sizes) > 3:
            trainer.model(x, y)[1].backward()  # gradients are there when the memory ends
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(trainer, x, y, between)

    monkeypatch.setattr(train.Trainer, "update", too_large)
    found = train.train(tiny(out_dir="small", batch_size=0))
    assert sizes[:7] == [8, 8, 8, 8, 4, 2, 2]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert "out of memory: from here on micro-batches of 2 sequences" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"micro-batch of 8 × 16 tokens does not fit .* set a smaller batch_size, or batch_size=0"
    ):
        train.train(tiny(out_dir="fixed"))


def test_an_evaluation_that_does_not_fit_halves_the_micro_batch_too(tiny, monkeypatch):
    expected = train.train(tiny(out_dir="plain", max_iters=2))
    original, sizes = train.Trainer.evaluate, []

    def too_large(trainer, offsets):
        sizes.append(trainer.batch_size)
        if trainer.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(trainer, offsets)

    def always_too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "evaluate", too_large)
    found = train.train(tiny(out_dir="small", max_iters=2, batch_size=0))
    assert sizes[:4] == [8, 4, 2, 2]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    monkeypatch.setattr(train.Trainer, "update", always_too_large)
    with pytest.raises(ValueError, match="set recompute=True"):
        train.train(tiny(out_dir="never", max_iters=2, batch_size=0))


@pytest.mark.parametrize(("n", "limit", "size"), [(480, 64, 60), (32, 64, 32), (7, 6, 1), (480, 0, 1), (30, 7, 6)])
def test_micro_batches_divide_the_sequences(n, limit, size):
    assert devices.smaller_batch_size(n, limit) == size


@pytest.mark.parametrize(
    "changes", [dict(dropout=0.1), dict(n_expert=3, norm="rmsnorm"), dict(share_layers=True)], ids=str
)
def test_recomputed_activations_give_the_same_run(tiny, changes):
    expected = train.train(tiny(out_dir="kept", max_iters=10, **changes))
    found = train.train(tiny(out_dir="recomputed", max_iters=10, recompute=True, **changes))
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


def test_recomputation_keeps_less(tiny):
    kept = {}
    for recompute in (False, True):
        trainer = train.Trainer(tiny(recompute=recompute, n_layer=6))
        x, y = next(iter(trainer.batches()))
        kept[recompute] = 0

        def keep(tensor, recompute=recompute):
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model(x, y)
    assert kept[True] < kept[False] / 2


@pytest.mark.parametrize(("amx", "avx512"), [(True, True), (False, True), (False, False)])
def test_auto_is_bfloat16_on_a_cpu_where_that_was_measured_to_be_faster(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    cpu, fast = torch.device("cpu"), torch.bfloat16 if avx512 else torch.float32
    for n_embd, vocab_size, n_decoded, expected in (
        (24, 320, None, torch.float32),
        (48, 320, None, torch.float32 if amx else fast),
        (64, 320, None, fast),
        (128, 320, 8, torch.float32),
        (384, 50304, 3, torch.float32),
        (384, 50304, 4, fast),
    ):
        config = GPTConfig(n_embd=n_embd, n_head=4, vocab_size=vocab_size)
        assert devices.choose_dtype("auto", cpu, config, n_decoded) == expected
        assert devices.choose_dtype("float16", cpu, config, n_decoded) == torch.float16
    assert devices.choose_dtype("auto", cpu, config, n_decoded=4, compiled=True) == torch.float32
