"""Checkpoints of nanoGPT and of the paper's authors: dicts in their forms, made of our own models, give our logits."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import eliminate
import sample
import train
from engine import checkpoint
from model import GPT, GPTConfig
from theory import trained_model

SHAPE = dict(block_size=16, vocab_size=19, n_layer=2, n_head=2, n_embd=16)
NANOGPT = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def random_model(seed=0, **changes):
    """A GPT whose weights are large enough for every part of it to matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def nanogpt(model, prefix="", masks=False, without=(), args=(), **entries):
    """What nanoGPT's train.py saves of a model; without: weights or model_args that are left out."""
    weights = {prefix + name: weight for name, weight in model.state_dict().items() if name not in without}
    if masks:
        tril = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
        for layer in range(model.config.n_layer):
            weights[f"{prefix}transformer.h.{layer}.attn.bias"] = tril
            weights[f"{prefix}transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    options = {name: getattr(model.config, name) for name in NANOGPT if name not in without} | dict(args)
    return {
        "model": weights,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": options,
        "iter_num": 12,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "openwebtext", "out_dir": "out", "batch_size": 12},
        **entries,
    }


def query_mode(config):
    """What the authors call the queries of a model."""
    residuals = {"linear": "residual", "mlp": "residual_gelu", None: "identity"}
    return residuals[config.query_residual] if config.wq_identity else "original"


def authors(model, without=(), **args):
    """What the train.py of the paper's authors saves of a model."""
    config = model.config
    options = {
        **dict(block_size=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer),
        **dict(num_heads=config.n_head, n_embd=config.n_embd, head_size=config.d_k, mlp_hidden_size=config.mlp_hidden),
        **dict(tie_weights=config.tie_weights, query_mode=query_mode(config)),
        **dict(dropout=0.0, bias=config.bias, batch_size=12, accumulation_size=40),
        "scale": config.attn_scale / math.sqrt(config.d_k),
        **dict(learning_rate=6e-4, weight_decay=2**-5, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True),
        **dict(warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, max_iters=105001),
        "save_checkpoint_steps": [50000, 100000, 105000],
        **args,
    }
    return {
        "model": {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: value for name, value in options.items() if name not in without},
        "iter_num": 105000,
        "best_val_loss": torch.tensor(2.875),
        "config": {"dataset": "openwebtext"},
    }


def assert_loads(path, state, model):
    """A file of state gives a model with the options and the logits of `model`."""
    torch.save(state, path)
    loaded = checkpoint.load(path)
    rebuilt = checkpoint.build_model(loaded).eval()
    assert rebuilt.config == model.config
    assert checkpoint.model_options(path) == dataclasses.asdict(model.config)
    idx, targets = torch.randint(19, (2, 3, 16))
    expected = model.to(torch.float32)(idx, targets)
    for got, wanted in zip(rebuilt(idx, targets), expected, strict=True):
        assert torch.equal(got, wanted)
    return loaded


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("changes", [dict(), dict(bias=True), dict(tie_weights=False)], ids=str)
def test_nanogpt_s_prefixes_and_masks(tmp_path, prefix, changes):
    model = random_model(**changes)
    loaded = assert_loads(tmp_path / "ckpt.pt", nanogpt(model, prefix, masks=True), model)
    assert (loaded["step"], loaded["best_val_loss"]) == (12, 3.25)


@pytest.mark.parametrize(
    "form",
    [
        dict(without=["vocab_size"]),
        dict(args=dict(vocab_size=None)),
        dict(without=["bias"]),
        dict(without=["dropout"]),
        dict(without=["lm_head.weight"]),
        dict(iter_num=np.int64(12), best_val_loss=np.float64(3.25)),
        dict(iter_num=torch.tensor(12), best_val_loss=np.float32(3.25)),
        dict(iter_num=12.0, best_val_loss=1e9),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_s_other_forms(tmp_path, form, bias):
    model = random_model(bias=bias)
    assert assert_loads(tmp_path / "ckpt.pt", nanogpt(model, "_orig_mod.", **form), model)["step"] == 12


def test_an_lm_head_that_is_equal_to_the_embedding_is_tied_to_it(tmp_path):
    model = random_model()
    state = nanogpt(model)
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"].clone()
    assert_loads(tmp_path / "ckpt.pt", state, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_precision(tmp_path, dtype):
    model = random_model(bias=True).to(dtype)
    assert_loads(tmp_path / "ckpt.pt", nanogpt(model), model)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(wq_identity=True, attn_scale=0.5),
        dict(wq_identity=True, attn_scale=0.5, mlp_ratio=4.5, tie_weights=False),
        dict(mlp_ratio=3.5, bias=True),
        dict(wq_identity=True, query_residual="linear", attn_scale=0.5),
        dict(wq_identity=True, query_residual="mlp", attn_scale=0.5, bias=True),
        dict(n_embd=6, n_head=2, attn_scale=0.5),  # 1/√3 is no short number
    ],
    ids=str,
)
def test_the_authors_checkpoints(tmp_path, changes):
    model = random_model(**changes)
    loaded = assert_loads(tmp_path / "ckpt.pt", authors(model), model)
    assert (loaded["step"], loaded["best_val_loss"]) == (105000, 2.875)


def test_the_authors_older_form(tmp_path):
    older = ["query_mode", "mlp_hidden_size", "save_checkpoint_steps", "max_iters"]
    for changes in (dict(), dict(wq_identity=True, attn_scale=0.5), dict(mlp_ratio=2.0)):
        model = random_model(**changes)
        state = authors(model, older, use_query_weights=not model.config.wq_identity)
        assert_loads(tmp_path / "ckpt.pt", state, model)
    model = random_model()
    assert_loads(tmp_path / "ckpt.pt", authors(model, [*older, "scale"], use_query_weights=True), model)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            lambda m: authors(m, query_mode="gelu"),
            "query_mode must be one of original, identity, residual, residual_gelu",
        ),
        (lambda m: authors(m, query_mode="residual_gelu"), "lacks the weight transformer.h.0.attn.residual"),
        (lambda m: authors(m, query_mode=3), "residual_gelu, got 3"),
        (lambda m: authors(m, query_mode=["original"]), "residual_gelu, got list"),
        (lambda m: authors(m, query_mode=torch.zeros(9, 9)), "residual_gelu, got Tensor"),
        (lambda m: authors(m, head_size=10), "head_size must be n_embd/num_heads = 16/2, got 10"),
        (lambda m: authors(m, scale="big"), "positive number scale, got 'big'"),
        (lambda m: authors(m, num_heads=0), "positive whole number num_heads, got 0"),
        (lambda m: authors(m, n_embd=None), "positive whole number n_embd, got None"),
        (lambda m: authors(m, mlp_hidden_size=1.5), "positive whole number mlp_hidden_size, got 1.5"),
        (lambda m: authors(m, split_layer=4), "does not know: split_layer"),
        (
            lambda m: authors(m, query_mode="identity"),
            "must have the shape (32, 16) by its model options, got (48, 16)",
        ),
        (lambda m: nanogpt(m, without=["n_head"]), "model_args lack n_head"),
        (lambda m: nanogpt(m, args=dict(n_layer="2")), "n_layer must be a whole number, got '2'"),
        (lambda m: nanogpt(m, args=dict(rotary=True)), "does not know: rotary"),
        (lambda m: nanogpt(m, without=["transformer.wte.weight"]), "no matrix transformer.wte.weight"),
        (lambda m: nanogpt(m, without=["transformer.ln_f.weight"]), "lacks the weight transformer.ln_f.weight"),
        (lambda m: nanogpt(m, iter_num="12"), "step must be a whole number, got str"),
        (lambda m: nanogpt(m, best_val_loss=None), "best_val_loss must be a number, got NoneType"),
        (lambda m: nanogpt(m) | {"model_args": [2, 2]}, "model_args must be a dict with names as keys, got list"),
        (lambda m: nanogpt(m) | {"model": {"transformer.wte.weight": torch.eye(19).to_sparse()}}, "dense tensor"),
        (lambda m: nanogpt(m) | {"model": None}, "model must be a dict with names as keys, got NoneType"),
        (lambda m: nanogpt(m) | {"model": {"transformer.wte.weight": "x"}}, "no matrix transformer.wte.weight"),
        (
            lambda m: nanogpt(m) | {"model": {**m.state_dict(), "module.lm_head.weight": torch.zeros(19, 16)}},
            "the weight lm_head.weight twice",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path, state, words):
    path = tmp_path / "ckpt.pt"
    torch.save(state(random_model()), path)
    with pytest.raises(ValueError) as refusal:
        checkpoint.load(path)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_command_reads_a_nanogpt_checkpoint(tiny, command, capsys):
    cfg = tiny(vocab_size=320, bias=True, max_iters=30, out_dir="out/run")
    expected = train.train(cfg)["val_loss"]
    model = checkpoint.build_model(checkpoint.load("out/run/ckpt.pt"))
    form = dict(prefix="module._orig_mod.", masks=True, args=dict(vocab_size=None), without=["lm_head.weight"])
    torch.save(nanogpt(model, **form, iter_num=np.int64(7), best_val_loss=np.float64(3.25)), "theirs.pt")

    evaluated = train.train(dataclasses.replace(cfg, init_from="theirs.pt", eval_only=True, out_dir="out/none"))
    assert evaluated["val_loss"] == pytest.approx(expected, abs=1e-6)
    continued = train.train(dataclasses.replace(cfg, init_from="theirs.pt", max_iters=4, out_dir="out/on"))
    assert continued["val_loss"] < expected + 0.1

    capsys.readouterr()  # what training printed
    arguments = ["--num_samples=1", "--max_new_tokens=9", "--temperature=0", "--dtype=float32", "--start=ab"]
    status, text, error = command(sample.main, "--ckpt=theirs.pt", "--tokenizer=bytes", *arguments)
    assert status == 0, error
    assert command(sample.main, "--out_dir=out/run", *arguments)[1] == text

    arguments = ["--ckpt=theirs.pt", "--dataset=tiny", "--windows=31"]
    status, out, error = command(trained_model.main, *arguments, "--out_dir=out/report")
    assert status == 0, error
    assert f"theirs.pt, step 7: loss {expected:.4f} nats" in out
    status, _, error = command(eliminate.main, *arguments, "--approximate", "--out=out/fitted/ckpt.pt")
    assert status == 0, error
    assert checkpoint.load("out/fitted/ckpt.pt")["eliminated"]["real"]["float32"]["loss_before"] == pytest.approx(
        expected, abs=1e-5
    )
