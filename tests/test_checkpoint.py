import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import configurator
from engine import checkpoint
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=8)


def state_of(model, **entries):
    return {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "step": 0, **entries}


def test_a_model_comes_back_as_it_was(tmp_path):
    for config in (SMALL, dataclasses.replace(SMALL, wq_identity=True, tie_weights=False, bias=True)):
        model = GPT(config)
        checkpoint.save(tmp_path / "ckpt.pt", **state_of(model, step=7))
        state = checkpoint.load(tmp_path / "ckpt.pt")
        assert state["step"] == 7
        loaded = checkpoint.build_model(state)
        assert loaded.config == config
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_checkpoint_that_nanogpt_wrote_loads(tmp_path):
    # Its layout: names of torch.compile, model_args, iter_num.
    model = GPT(SMALL)
    arguments = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    torch.save(
        {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
            "model_args": {name: getattr(SMALL, name) for name in arguments},
            "iter_num": 12,
            "best_val_loss": torch.tensor(3.0),
            "config": {"dataset": "openwebtext"},
        },
        tmp_path / "ckpt.pt",
    )
    state = checkpoint.load(tmp_path / "ckpt.pt")
    idx = torch.randint(19, (2, 8))
    assert state["step"] == 12
    assert torch.equal(checkpoint.build_model(state).eval()(idx)[0], model.eval()(idx)[0])


def test_unreadable_checkpoints_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint.load(path)
    checkpoint.save(path, **state_of(GPT(SMALL)))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the checkpoint"):
            checkpoint.load(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of format"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_no_code_in_a_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, "ckpt.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        checkpoint.load("ckpt.pt")
    assert not Path("unpickled").exists()


def test_weights_of_another_shape_are_refused_with_the_options_that_differ(tmp_path):
    state = state_of(GPT(SMALL))
    other = GPT(dataclasses.replace(SMALL, n_embd=16, wq_identity=True))
    with pytest.raises(ValueError, match="n_embd is 8 in the checkpoint and 16 here; wq_identity is False") as refusal:
        checkpoint.load_weights(other, state)
    assert "\n" not in str(refusal.value)
    state["model_config"]["future_option"] = 1
    with pytest.raises(ValueError, match="future_option"):
        checkpoint.build_model(state)


def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path):
    # A process writes checkpoints without end; whenever it is killed, the one under the name is whole.
    program = (
        "import sys, torch\nfrom engine import checkpoint\n"
        "for step in range(10**6):\n"
        "    checkpoint.save(sys.argv[1], step=step, tensor=torch.full((300_000,), float(step)))\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "ckpt.pt"
    root = configurator.ROOT
    for delay in (0.0, 0.003, 0.007):
        with subprocess.Popen([sys.executable, "-c", program, path], cwd=root, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        state = checkpoint.load(path)
        assert torch.equal(state["tensor"], torch.full((300_000,), float(state["step"])))


def test_a_link_keeps_what_it_was_made_of(tmp_path):
    path = tmp_path / "ckpt.pt"
    for step in range(3):
        checkpoint.save(path, step=step)
        if step != 2:
            checkpoint.link(path, "best.pt")
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 1
    assert checkpoint.load(path)["step"] == 2
