"""The training loop: what it computes, reads, writes, and goes on with."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from trained import arguments, assert_equal_weights, metrics, stop_after, weights

import data
import train
from engine import checkpoint, run_files
from model import GPT


@pytest.mark.parametrize("stop_at", [20, 23])
@pytest.mark.parametrize("options", [dict(wq_identity=True), dict(dropout=0.2, batch_size=4, bias=True)])
def test_a_stopped_and_resumed_run_equals_one_that_ran_through(tiny, tmp_path, monkeypatch, capsys, stop_at, options):
    straight, parts = str(tmp_path / "straight"), str(tmp_path / "parts")
    expected = train.train(tiny(out_dir=straight, **options))
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        assert train.train(tiny(out_dir=parts, **options)) is None
    assert f"python train.py --out_dir={parts} --resume" in capsys.readouterr().out
    assert not Path(parts, "summary.json").exists()
    assert checkpoint.load(Path(parts, "ckpt.pt"))["step"] == stop_at
    result = train.train(tiny(out_dir=parts, resume=True, **options))
    assert_equal_weights(weights(straight), weights(parts))
    assert metrics(straight) == metrics(parts)
    assert result["val_loss"] == expected["val_loss"]
    assert [r["step"] for r in metrics(parts) if r["kind"] == "eval"] == [0, 10, 20, 30, 40]
    assert len(json.loads(Path(parts, "run.json").read_text())["segments"]) == 2


def test_another_micro_batch_changes_nothing_but_rounding(tiny, tmp_path, monkeypatch):
    straight, parts = str(tmp_path / "straight"), str(tmp_path / "parts")
    train.train(tiny(out_dir=straight))
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        train.train(tiny(out_dir=parts))
    train.train(tiny(out_dir=parts, resume=True, batch_size=2))
    assert_equal_weights(weights(straight), weights(parts), rtol=2e-4, atol=2e-5)
    for one, other in zip(metrics(straight), metrics(parts), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-4)


def test_a_killed_run_loses_only_what_came_after_its_checkpoint(tiny, tmp_path):
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    train.train(tiny(out_dir=straight))
    update = train.Trainer.update

    class Killed(BaseException):
        pass

    def dies(self, *batch):
        done = update(self, *batch)
        if self.step == 27:
            raise Killed
        return done

    train.Trainer.update = dies
    try:
        with pytest.raises(Killed):
            train.train(tiny(out_dir=killed))
    finally:
        train.Trainer.update = update
    with open(Path(killed, "metrics.jsonl"), "a") as file:
        file.write('{"step": 27, "kind": "tr')  # what a power cut may leave
    assert checkpoint.load(Path(killed, "ckpt.pt"))["step"] == 20
    train.train(tiny(out_dir=killed, resume=True))
    assert_equal_weights(weights(straight), weights(killed))
    assert metrics(straight) == metrics(killed)


def test_evaluations_change_nothing(tiny, tmp_path):
    often, never = str(tmp_path / "often"), str(tmp_path / "never")
    train.train(tiny(out_dir=often, eval_interval=3, dropout=0.1))
    train.train(tiny(out_dir=never, eval_interval=1000, dropout=0.1))
    assert_equal_weights(weights(often), weights(never))
    assert [r for r in metrics(often) if r["kind"] == "train"] == [r for r in metrics(never) if r["kind"] == "train"]


def test_variants_with_one_seed_read_the_same_data(tiny, monkeypatch):
    read = {}
    windows = data.windows

    def record(tokens, offsets, *sizes):
        read.setdefault(name, []).append(np.array(offsets))
        return windows(tokens, offsets, *sizes)

    monkeypatch.setattr(data, "windows", record)
    for name, options in {
        "baseline": {},
        "reduced": dict(wq_identity=True, attn_scale=0.5, weight_decay=2**-5),
        "smaller micro-batch": dict(batch_size=2, mlp_ratio=2.0),
        "other weights": dict(seed=2, data_seed=1337),
        "other data": dict(data_seed=2),
    }.items():
        trainer = train.Trainer(tiny(data_seed=1337) if not options else tiny(**{"data_seed": 1337, **options}))
        batches = trainer.batches()
        for _ in range(5):
            next(batches)
        batches.close()
        read[name] = np.concatenate(read[name][:5])
    for name in ("reduced", "smaller micro-batch", "other weights"):
        assert np.array_equal(read["baseline"], read[name])
    assert not np.array_equal(read["baseline"], read["other data"])


@pytest.mark.parametrize("wq_identity", [False, True])
def test_gradients_do_not_depend_on_the_accumulation(tiny, wq_identity):
    gradients, losses = {}, {}
    for batch_size in (1, 8):
        trainer = train.Trainer(tiny(wq_identity=wq_identity, batch_size=batch_size, grad_clip=0))
        x, y = next(iter(trainer.batches()))
        with torch.no_grad():
            _, expected = trainer.model(x, y)
        trainer.update(x, y)
        losses[batch_size], _ = trainer.unchecked[0]
        gradients[batch_size] = {name: p.grad for name, p in trainer.model.named_parameters()}
    torch.testing.assert_close(losses[1], losses[8])
    torch.testing.assert_close(losses[8], expected)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[8][name], rtol=1e-4, atol=1e-7)


def test_the_evaluation_is_the_mean_over_tokens_whatever_its_batch_size(tiny):
    trainer = train.Trainer(tiny())
    offsets = trainer.all_windows
    assert len(offsets) == 499 // 16
    with torch.no_grad():
        x, y = data.windows(trainer.bins.val, offsets, 16)
        plain = GPT(trainer.cfg.model_config()).eval()  # which gives logits, and its loss from all of them
        plain.load_state_dict(trainer.model.state_dict())
        logits, _ = plain(x, y)
        log_p = logits.double().log_softmax(-1)
        expected = -log_p.gather(-1, y[..., None])[..., 0].mean(1).numpy()
    for batch_size in (1, 3, 8, 64):
        trainer.batch_size = batch_size
        losses = trainer.evaluate(offsets)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
    result = train.mean_and_error(losses)
    assert result["val_loss"] == pytest.approx(expected.mean())
    assert result["val_loss_se"] == pytest.approx(expected.std(ddof=1) / len(expected) ** 0.5)


def test_a_command_takes_the_vocabulary_of_the_data_unless_one_is_given(tiny, monkeypatch, command):
    cfg = tiny()
    options = [f"--{name}={getattr(cfg, name)}" for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")]
    options += ["--dataset=tiny", "--max_iters=1", "--warmup_iters=0", "--tokens_per_step=128", "--eval_windows=4"]

    def vocabulary(*more, out_dir):
        status, out, error = command(train.main, *options, *more, f"--out_dir={out_dir}")
        assert status == 0, error
        return checkpoint.load(f"{out_dir}/ckpt.pt")["model_config"]["vocab_size"]

    assert vocabulary(out_dir="own") == 64  # of 50 tokens
    assert vocabulary("--vocab_size=70", out_dir="given") == 70
    assert vocabulary("--init_from=given/ckpt.pt", out_dir="from") == 70
    manifest = data.read_manifest("data/tiny")
    data.write_manifest(Path("data/tiny"), **{**manifest, "vocab_size": 64})
    assert vocabulary(out_dir="larger") == 64
    assert vocabulary("--objective=mlm", "--causal=False", out_dir="masked") == 128  # and a mask
    assert vocabulary("--resume", "--max_iters=2", out_dir="own") == 64
    planned = data.with_vocabulary({"dataset": "none"}, train.TrainConfig)
    assert planned == {"dataset": "none"}


def test_training_needs_no_optional_library(tiny):
    """A machine that has torch, numpy and tqdm alone trains, resumes and evaluates bins that were made elsewhere."""
    cfg = tiny()
    missing = (
        "datasets",
        "wandb",
        "gigatoken",
        "tiktoken",
        "transformers",
        "matplotlib",
        "scipy",
        "pyarrow",
        "awkward",
    )
    values = {**TINY, "dataset": "tiny", "out_dir": "out/run", "max_iters": 3, "warmup_iters": 0}
    Path("size.py").write_text("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    lines = [f"import sys; sys.modules.update(dict.fromkeys({missing}))", "import train"]
    lines += ["train.main(['size.py'])", "train.main(['--out_dir=out/run', '--resume', '--max_iters=5'])"]
    lines += ["train.main(['--out_dir=out/run', '--eval_only'])"]
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=Path(cfg.data_dir).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_loss: ") == 3


def test_a_step_of_very_many_micro_batches_is_said(tiny, capsys):
    train.train(tiny(max_iters=1, batch_size=1, tokens_per_step=101 * 16, warmup_iters=0))
    assert "warning: a step of 1,616 tokens is 101 micro-batches of 1 × 16: " in capsys.readouterr().out
    train.train(tiny(max_iters=1, batch_size=1, tokens_per_step=100 * 16, warmup_iters=0, out_dir="fewer"))
    assert "micro-batches" not in capsys.readouterr().out


def test_the_summary_has_bits_per_byte_where_the_bytes_are_known(tiny):
    cfg = tiny(max_iters=2)
    assert "bits_per_byte" not in train.train(cfg)
    folder = Path(cfg.data_dir) / cfg.dataset
    manifest = data.read_manifest(folder)
    manifest["splits"]["val"]["bytes"] = 3 * manifest["splits"]["val"]["tokens"]
    data.write_manifest(folder, **manifest)
    result = train.train(dataclasses.replace(cfg, out_dir="again"))
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2) / 3)
    evaluated = train.train(dataclasses.replace(cfg, out_dir="again", eval_only=True))
    assert evaluated["bits_per_byte"] == result["bits_per_byte"]
    encoder = dict(objective="mlm", causal=False, out_dir="mlm")
    assert "bits_per_byte" not in train.train(dataclasses.replace(cfg, **encoder))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_decays_as_its_row_of_table_2_says(tiny, tie_weights):
    cfg = tiny(
        weight_decay=0.4, weight_decay_attn=0.1, weight_decay_mlp=0.2, tie_weights=tie_weights, bias=True, batch_size=8
    )
    model = GPT(cfg.model_config())
    optimizer = train.make_optimizer(model, cfg, "cpu")
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            expected = 0.0
        elif ".attn." in name:
            expected = 0.1
        elif ".mlp." in name:
            expected = 0.2
        else:
            expected = 0.4
        assert decay[id(parameter)] == expected, name


def test_one_step_is_torch_s_adamw_on_the_clipped_gradient(tiny):
    trainer = train.Trainer(tiny(warmup_iters=0, grad_clip=0.05, weight_decay=0.3))
    model = copy.deepcopy(trainer.model)
    x, y = next(iter(trainer.batches()))
    trainer.update(x, y)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.3), dict(params=vectors, weight_decay=0.0)],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=False,
        foreach=False,
    )
    model(x, y)[1].backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert norm > 0.05
    for p in model.parameters():
        p.grad *= 0.05 / norm
    reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.state_dict()[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_the_run_folder_holds_what_it_should(tiny, tmp_path):
    summary = train.train(tiny(save_steps=(15, 30), wq_identity=True))
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "run.json", "metrics.jsonl", "summary.json"),
        *("ckpt.pt", "best.pt", "step_000015.pt", "step_000030.pt"),
    }
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert json.loads((folder / "config.json").read_text())["wq_identity"] is True
    run = json.loads((folder / "run.json").read_text())
    assert run["data"]["fingerprint"] == data.load_bins("data", "tiny").fingerprint
    assert run["parameters"]["total"] == sum(p.numel() for p in GPT(tiny(wq_identity=True).model_config()).parameters())
    assert [checkpoint.load(folder / f"step_{step:06d}.pt")["step"] for step in (15, 30)] == [15, 30]
    records = metrics(folder)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 41))
    evaluations = {r["step"]: r["val_loss"] for r in records if r["kind"] == "eval"}
    assert checkpoint.load(folder / "best.pt")["step"] == min(evaluations, key=evaluations.get)
    assert summary["best_val_loss_during_training"] == min(evaluations.values())
    assert {r["windows"] for r in records if r["kind"] == "eval"} == {7}, "the same windows at every step, the last too"
    assert evaluations[40] < evaluations[0] - 0.5, "it learns"
    assert (summary["steps"], summary["tokens"], summary["windows"]) == (40, 40 * 128, 31)
    assert summary["val_loss"] == pytest.approx(evaluations[40], rel=0.2)


def test_eval_only_repeats_the_final_evaluation_and_writes_nothing(tiny, tmp_path):
    summary = train.train(tiny())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    result = train.train(tiny(eval_only=True))
    assert result["val_loss"] == summary["val_loss"]
    result = train.train(tiny(eval_only=True, init_from=str(tmp_path / "run/ckpt.pt"), out_dir="elsewhere"))
    assert result["val_loss"] == summary["val_loss"]
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert not Path("elsewhere").exists()


def test_a_run_starts_from_the_weights_of_another(tiny, tmp_path):
    train.train(tiny(out_dir="first"))
    train.train(tiny(out_dir="second", init_from="first/ckpt.pt", seed=5))
    first = [r["val_loss"] for r in metrics("first") if r["kind"] == "eval"]
    second = [r["val_loss"] for r in metrics("second") if r["kind"] == "eval"]
    assert second[0] == first[-1]


def test_a_finished_run_can_be_extended_and_is_left_alone_otherwise(tiny, command, tmp_path, monkeypatch):
    train.train(tiny())
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    status, out, _ = command(train.main, "--out_dir=run", "--resume")
    assert (status, before) == (0, (tmp_path / "run/ckpt.pt").read_bytes())
    assert "finished" in out
    with monkeypatch.context() as patch:
        stop_after(patch, 42)
        status, out, _ = command(train.main, "--out_dir=run", "--resume", "--max_iters=45")
    assert status == 130
    assert "max_iters is 40 in the checkpoint and 45 here" in out
    assert not Path("run/summary.json").exists(), "a run that goes on is not finished"
    assert command(train.main, "--out_dir=run", "--resume")[0] == 0
    assert metrics("run")[-1]["step"] == 45


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_near_float32(tiny, tmp_path, dtype):
    full = train.train(tiny(out_dir="full"))
    lower = train.train(tiny(out_dir="lower", dtype=dtype))
    assert lower["val_loss"] == pytest.approx(full["val_loss"], abs=0.05)
    assert lower["val_loss"] != full["val_loss"]
    curves = [[r["loss"] for r in metrics(name) if r["kind"] == "train"] for name in ("full", "lower")]
    np.testing.assert_allclose(*curves, atol=0.1)


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.long)])
def test_a_compiled_model_trains_to_the_same_loss(tiny, request, how):
    if how == "traced":
        request.getfixturevalue("traced")
    plain = train.train(tiny(out_dir="plain", wq_identity=True))
    compiled = train.train(tiny(out_dir="compiled", wq_identity=True, compile=True))
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)
    assert weights("compiled").keys() == weights("plain").keys()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tiny, tmp_path, command, monkeypatch):
    update = train.Trainer.update

    def poison(self, *batch):
        if self.step == 25:
            with torch.no_grad():
                self.model.transformer.ln_f.weight[0] = math.nan
        return update(self, *batch)

    monkeypatch.setattr(train.Trainer, "update", poison)
    options = {**TINY, "out_dir": "run", "log_interval": 7}
    status, _, error = command(train.main, *arguments(**options))
    assert status == 1
    assert error.count("\n") == 1 and "step 26: loss nan" in error
    dump = json.loads(Path("run/nonfinite.json").read_text())
    assert dump["step"] == 26
    assert dump["offsets"] == data.batch_offsets(4000, 16, 8, 1337, 25).tolist()
    assert [math.isfinite(float(before["loss"])) for before in dump["before"]] == [True] * 4
    state = checkpoint.load("run/ckpt.pt")
    assert state["step"] == 20
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    monkeypatch.setattr(train.Trainer, "update", update)
    assert command(train.main, "--out_dir=run", "--resume")[0] == 0


def test_no_waiting_for_the_device_between_log_lines(tiny, monkeypatch):
    trainer = train.Trainer(tiny())
    x, y = next(iter(trainer.batches()))

    def waits(*_):
        raise AssertionError("a value was fetched from the device")

    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    trainer.optimizer.step = lambda: None  # fused on CUDA; the CPU's own is free to read
    trainer.update(x, y)


def test_without_wandb_nothing_is_asked_of_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.train(tiny(max_iters=1))
    with pytest.raises(ValueError, match="pip install wandb"):
        train.train(tiny(max_iters=1, wandb_log=True, out_dir="mirrored"))
    assert not Path("mirrored").exists()


@pytest.mark.slow
def test_an_offline_wandb_run_is_mirrored_in_segments_of_one_group(tiny, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, started = [], []
    init = wandb.init

    def recording_init(**options):
        started.append(options)
        run = init(**options)
        log = run.log
        run.log = lambda values: (logged.append(values), log(values))
        return run

    monkeypatch.setattr(wandb, "init", recording_init)
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        train.train(tiny(wandb_log=True))
    train.train(tiny(wandb_log=True, resume=True))
    assert started[0]["group"] == started[1]["group"] == json.loads(Path("run/run.json").read_text())["wandb_id"]
    assert started[0]["id"] != started[1]["id"]
    assert started[0]["resume"] is None
    assert len(list(Path("run/wandb").glob("offline-run-*"))) == 2
    assert {values["step"] for values in logged if "train/loss" in values} == set(range(1, 41))


def test_the_state_of_a_run_is_plain(tiny, tmp_path):
    cfg = tiny(max_iters=2)
    train.train(cfg)
    state = torch.load("run/ckpt.pt", weights_only=True)
    expected = (
        "format model model_config optimizer scaler step rng best_val_loss config data_fingerprint train_seconds "
        "wall_seconds links"
    )
    assert set(state) == set(expected.split())
    assert state["config"] == {**dataclasses.asdict(cfg), "data_seed": cfg.seed}
    assert all(name.startswith(("transformer.", "lm_head.")) for name in state["model"])


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
def test_the_fast_path_s_curve_is_that_of_a_plain_float32_loop(tiny, device):
    cfg = tiny(max_iters=200, eval_interval=1000, batch_size=4, wq_identity=True, attn_scale=0.5, device=device)
    train.train(dataclasses.replace(cfg, dtype="bfloat16", compile=device == "cuda"))
    fast = np.array([r["loss"] for r in run_files.read_metrics(cfg.out_dir) if r["kind"] == "train"])

    def plain(seed):
        torch.manual_seed(seed)
        model = GPT(cfg.model_config())
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
        bins, losses = data.load_bins(cfg.data_dir, cfg.dataset), []
        for step in range(cfg.max_iters):
            offsets = data.batch_offsets(len(bins.train), cfg.block_size, 8, cfg.data_seed, step)
            _, loss = model(*data.windows(bins.train, offsets, cfg.block_size))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate_at(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return np.array(losses)

    same, other = plain(cfg.seed), plain(cfg.seed + 1)
    distance, chance = np.abs(fast - same), np.abs(other - same)
    assert fast[0] == pytest.approx(same[0], rel=2**-8)
    assert distance.mean() < 0.005
    assert distance.mean() < chance.mean() / 10  # than a run from other weights is
    assert abs(fast[-50:].mean() - same[-50:].mean()) < 0.005
