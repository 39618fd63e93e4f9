"""Planning: memory is what autograd keeps, speed follows from utilisation, and 'measured' is what was measured."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import bench
from engine.flops import cost
from model import GPT, GPTConfig
from speed import hardware, planning
from train_config import TrainConfig

H100 = "NVIDIA H100 80GB HBM3"


def test_memory_of_the_124m_model_by_hand():
    need = planning.training_memory(GPTConfig(), batch_size=12)
    assert need.states == 16 * 124_373_760 + 2 * (84_934_656 + 50_304 * 768)
    assert need.logits == 12 * 1024 * 50_304 * 14
    assert need.activations == 12 * 1024 * (12 * (36 * 768 + 4 * 12 + 16) + 6 * 768 + 8)
    recomputed = planning.training_memory(GPTConfig(), batch_size=12, recompute=True)
    assert recomputed.activations == 12 * 1024 * (12 * 4 * 768 + 36 * 768 + 4 * 12 + 16 + 6 * 768 + 8)
    chunked = planning.training_memory(GPTConfig(), batch_size=12, chunked_loss=True)
    assert chunked.logits == 10 * 2**26 + 4 * 768 * 50_304 + 2 * 12 * 1024 * 768
    sharded = planning.training_memory(GPTConfig(), 12, n_shards=8)
    assert sharded.states == 2 * 124_373_760 + 2 * (84_934_656 + 50_304 * 768)


@pytest.mark.parametrize(
    "changes", [dict(), dict(wq_identity=True), dict(n_kv_head=2), dict(mlp_ratio=3.5, n_layer=5)], ids=str
)
def test_activations_are_what_autograd_keeps(changes, monkeypatch):
    monkeypatch.setattr("model.attend", F.scaled_dot_product_attention)  # as on a GPU
    config = GPTConfig(**{**dict(block_size=64, vocab_size=320, n_layer=3, n_head=4, n_embd=64), **changes})
    model = GPT(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    idx, kept = torch.randint(320, (2, 64)), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | {idx.untyped_storage().data_ptr()}:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        _, loss = model(idx, idx)
    need, tokens = planning.training_memory(config, batch_size=2), idx.numel()
    copies = 2 * (cost(config).attn_mlp + 320 * config.n_embd)  # counted among the states
    log_probabilities = 4 * tokens * 320  # counted among the logits
    # The 4 bytes are the number of targets, which the loss keeps.
    assert sum(storage.nbytes() for storage in kept.values()) - copies - log_probabilities == need.activations + 4


def measured_file(path, cfg, device=H100, dtype="bfloat16", of_peak=0.45):
    flops = {
        model: cost(dataclasses.replace(cfg.model_config(), wq_identity=model == "reduced")).training_flops
        for model in ("baseline", "reduced")
    }
    rows = [
        dict(what="training step", model=model, of_peak=of_peak, tokens_per_second=of_peak * 989.4e12 / flops[model])
        if of_peak
        else dict(what="training step", model=model, of_peak=None, tokens_per_second=1.0)
        for model in flops
    ]
    header = dict(device=device, dtype=dtype, date="2026-01-01")
    path.write_text(json.dumps(dict(header=header, config=dataclasses.asdict(cfg), rows=rows)))
    return path


def test_the_plan_has_each_combination_and_marks_what_was_measured(tmp_path):
    cfg = TrainConfig(batch_size=12)
    path = measured_file(tmp_path / "speed.json", cfg)
    rows = planning.plan_rows(cfg, planning.read_measured(path))
    combinations = [(row["gpu"], row["size"], row["model"], row["n_gpus"]) for row in rows]
    assert len(set(combinations)) == len(combinations) == len(hardware.DATASHEETS) * 4 * 2 * 2
    assert [row["basis"] for row in rows].count("measured") == 2
    assert not [row for row in planning.plan_rows(cfg) if row["basis"] == "measured"]
    by_name = dict(zip(combinations, rows, strict=True))
    small = "124M (this configuration)"
    one, eight = (by_name[H100, small, "baseline", n] for n in planning.GPU_COUNTS)
    assert one["basis"] == "measured" and eight["basis"] == "extrapolated"
    operations = 6 * (84_934_656 + 50_304 * 768) + 12 * 12 * 768 * 1024
    assert one["tokens_per_second"] == pytest.approx(0.45 * 989.4e12 / operations)
    assert eight["tokens_per_second"] == pytest.approx(8 * one["tokens_per_second"])
    assert one["days"] == pytest.approx(105_000 * 491_520 / one["tokens_per_second"] / 86_400)
    assert one["days"] / by_name[H100, small, "reduced", 1]["days"] == pytest.approx(
        operations / (operations - 6 * 12 * 768**2)
    )
    large = by_name[H100, "1.3B", "baseline", 1]  # with recompute: its blocks' forward pass runs twice
    d, d_layers = 2048, 24
    products, attention = 6 * (12 * d**2 * d_layers), 12 * d_layers * d * 1024
    operations = (products + attention) * 4 / 3 + 6 * d * 50_304
    assert large["tokens_per_second"] == pytest.approx(0.45 * 989.4e12 / operations)
    other = by_name["NVIDIA GeForce RTX 4090", small, "baseline", 1]
    assert other["utilisation"] == 0.746 and "llm.c" in other["source"]
    assert other["tokens_per_second"] == pytest.approx(144_000, rel=0.002)


def test_a_micro_batch_fits_and_the_next_larger_does_not():
    cfg = TrainConfig(batch_size=12)
    limit = planning.training_memory(cfg.model_config(), 6).total
    assert planning.fitting_batch_size(cfg, limit, n_shards=1) == 6
    assert planning.fitting_batch_size(cfg, limit - 1, n_shards=1) == 3
    assert planning.fitting_batch_size(cfg, 10**9, n_shards=1) is None


def test_the_printed_plan(tmp_path, capsys):
    result = bench.bench(bench.BenchConfig(plan=True, json=str(tmp_path / "plan.json")))
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text()) == result
    lines = [line for line in printed.splitlines() if line.startswith("| 1") or line.startswith("| 3")]
    assert {line.count("|") for line in lines} == {10}
    assert all(
        line.endswith(("| extrapolated |", "| does not fit |")) for line in printed.splitlines() if "| 1.3B" in line
    )
    assert any("| — | — | does not fit |" in line for line in printed.splitlines())


def test_a_file_without_the_utilisation_in_bfloat16_is_refused(refuses, tmp_path):
    cfg = TrainConfig()
    path = measured_file(tmp_path / "cpu.json", cfg, device="Intel(R) Xeon(R) Processor", of_peak=None)
    refuses(bench.main, "--plan", f"--measured={path}", words=[path, "the utilisation of a training step", "Xeon"])
    path = measured_file(tmp_path / "float32.json", cfg, dtype="float32")
    refuses(bench.main, "--plan", f"--measured={path}", words=[path, "in bfloat16", "in float32"])
    path.write_text("{}")
    refuses(bench.main, "--plan", f"--measured={path}", words=[path, "must name a JSON file of measurements"])
