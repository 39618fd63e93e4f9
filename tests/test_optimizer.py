"""Muon beside AdamW: each parameter has one of them, the steps are torch's, and a resumed run is the straight one."""

import copy
import dataclasses

import pytest
import torch

import train
from engine import checkpoint
from engine.optimizer import make_optimizer
from model import GPT

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def test_the_matrices_of_the_blocks_are_muon_s_and_the_rest_adamw_s(tiny):
    cfg = tiny(optimizer="muon", weight_decay=0.4, weight_decay_mlp=0.2, bias=True)
    model = GPT(cfg.model_config())
    muon, adamw = make_optimizer(model, cfg, "cpu").optimizers
    owned = {
        id(p): optimizer for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(owned) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        of_muon = parameter.dim() == 2 and (".attn." in name or ".mlp." in name)
        assert owned[id(parameter)] is (muon if of_muon else adamw), name
    assert [group["weight_decay"] for group in muon.param_groups] == [0.4, 0.2]


def test_a_step_is_torch_s_for_each(tiny):
    cfg = tiny(optimizer="muon", learning_rate=0.02)
    torch.manual_seed(0)
    model = GPT(cfg.model_config())
    other = copy.deepcopy(model)
    names = [name for name, parameter in other.named_parameters() if parameter.dim() == 2 and ".h." in name]
    parameters = dict(other.named_parameters())
    theirs = [
        torch.optim.Muon([parameters[n] for n in names], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for n, p in parameters.items() if p.dim() == 2 and n not in names], "weight_decay": 0.1},
                {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=0.02,
            betas=(cfg.beta1, cfg.beta2),
            fused=True,
        ),
    ]
    optimizer = make_optimizer(model, cfg, "cpu")
    idx = torch.randint(50, (4, 16))
    for _ in range(3):
        for gpt, steps in ((model, [optimizer]), (other, theirs)):
            gpt.zero_grad()
            gpt(idx, idx)[1].backward()
            for each in steps:
                each.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize(
    "changes", [dict(), dict(activation="swiglu", mlp_ratio=2.625, qk_norm=True, pos="rope")], ids=str
)
def test_a_resumed_run_is_the_straight_one(tiny, changes, monkeypatch):
    cfg = tiny(optimizer="muon", max_iters=12, eval_interval=4, **changes)
    train.train(dataclasses.replace(cfg, out_dir="straight"))
    update = train.Trainer.update

    def update_and_stop(self, *batch):
        done = update(self, *batch)
        if self.step == 7:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", update_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(dataclasses.replace(cfg, out_dir="parts"))
    train.train(dataclasses.replace(cfg, out_dir="parts", resume=True))
    straight, parts = (checkpoint.load(f"{name}/ckpt.pt") for name in ("straight", "parts"))
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in straight["model"].items())
    for index, entry in straight["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][index][name]) for name, value in entry.items())
    assert "momentum_buffer" in straight["optimizer"]["state"][0]


def test_a_run_keeps_its_kind_of_optimizer(tiny, refuses):
    train.train(tiny(max_iters=4))
    refuses(
        train.main,
        "--out_dir=run",
        "--resume",
        "--optimizer=muon",
        "--max_iters=8",
        words=["belongs to another run", "optimizer is adamw in the checkpoint and muon here"],
    )
    refuses(train.main, "--optimizer=muon", "--shard=full", words=["optimizer=muon needs whole matrices"])


def test_a_torch_without_muon_says_so(tiny, monkeypatch):
    cfg = tiny(optimizer="muon")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optimizer=muon needs a torch that has torch"):
        make_optimizer(GPT(cfg.model_config()), cfg, "cpu")
