"""The command that rewrites checkpoints: the new checkpoint loads, samples, continues training, has the same loss."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import configurator
import data
import eliminate
import sample
import train
from engine import checkpoint, run_files
from engine.files import read_json
from model import SelfAttention
from theory import reparametrize, verification, weights

ATTENTION_SKIP_ONLY = dict(norm="none", mlp_skip=False, vocab_size=320)
SCHEDULE = dict(max_iters=200, learning_rate=1e-2, eval_interval=1000, eval_windows=1000, log_interval=100)


@pytest.fixture
def trained(tiny):
    """Trains a run in out/run, by default with attention skips only, and returns its TrainConfig."""

    def make(**changes):
        cfg = tiny(**{**ATTENTION_SKIP_ONLY, **SCHEDULE, "out_dir": "out/run", **changes})
        train.train(cfg)
        return cfg

    return make


def options(**changes):
    return eliminate.EliminateConfig(
        **{"ckpt": "out/run/ckpt.pt", "out": "out/new/ckpt.pt", "windows": None, **changes}
    )


def validation_loss(cfg, path):
    """The loss of a checkpoint's weights on all of val.bin, computed by train.py."""
    return train.train(dataclasses.replace(cfg, init_from=str(path), eval_only=True, out_dir="out/none"))["val_loss"]


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        (dict(), "q"),
        (dict(tie_weights=False, pos="rope", n_kv_head=1), "q"),
        (dict(bias=True, activation="relu"), "v"),
        (dict(causal=False, objective="mlm", n_expert=3), "k"),
    ],
    ids=str,
)
def test_a_trained_model_has_the_same_loss_without_the_projection(trained, changes, which):
    cfg = trained(**changes)
    state = checkpoint.load("out/run/ckpt.pt")
    found = eliminate.eliminate(options(which=which))
    real = found["real"]
    assert real["float64"]["loss_after"] == pytest.approx(real["float64"]["loss_before"], abs=1e-6)
    assert real["float32"]["loss_after"] == pytest.approx(real["float32"]["loss_before"], abs=1e-4)
    assert real["float64"]["relative"] < real["float64"]["bound"] / 4 < 1e-9
    assert real["bfloat16"]["loss_before"] != real["bfloat16"]["loss_after"]  # two models were compared
    assert found["random"]["float64"]["relative"] < found["random"]["float64"]["bound"] / 4 < 1e-9

    reduced = dataclasses.replace(cfg, **{f"w{which}_identity": True})
    before, after = validation_loss(cfg, "out/run/ckpt.pt"), validation_loss(reduced, "out/new/ckpt.pt")
    assert before < 3.75  # a constant guess of the 50 tokens has ln 50 = 3.9
    assert before == pytest.approx(real["float32"]["loss_before"], abs=1e-5)  # the command measures what train.py does
    assert after == pytest.approx(before, abs=1e-4)

    new = checkpoint.load("out/new/ckpt.pt")
    assert new["step"] == 200
    assert "optimizer" not in new
    assert new["eliminated"]["cond"] == found["cond"]
    assert new["config"] == {**state["config"], f"w{which}_identity": True}
    model = checkpoint.build_model(new)
    sizes = [checkpoint.build_model(s).num_params().total for s in (state, new)]
    assert tuple(sizes) == found["parameters"]
    assert sizes[0] - sizes[1] == 2 * (16**2 + 16 * model.config.bias)


def test_the_new_file_samples_the_same_text_and_can_be_trained_further(trained):
    cfg = trained(max_iters=60)
    eliminate.eliminate(options())
    texts = [
        sample.sample(sample.SampleConfig(out_dir=f, start="def", temperature=0, num_samples=1, max_new_tokens=200))
        for f in ("out/run", "out/new")
    ]
    assert texts[0] == texts[1]
    reduced = checkpoint.build_model(checkpoint.load("out/new/ckpt.pt"))
    assert read_json("out/new/run.json")["parameters"]["total"] == reduced.num_params().total

    before = validation_loss(cfg, "out/run/ckpt.pt")
    on = dict(wq_identity=True, init_from="out/new/ckpt.pt", out_dir="out/on", learning_rate=1e-3, max_iters=50)
    train.train(dataclasses.replace(cfg, **on))
    losses = [record["val_loss"] for record in run_files.read_metrics("out/on") if record["kind"] == "eval"]
    assert losses[0] == pytest.approx(before, abs=1e-4)  # before the first step
    assert losses[-1] < before


def test_what_it_prints(trained, command):
    trained()
    status, out, _ = command(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/run/new.pt", "--gauge=orthonormal")
    assert status == 0
    found = checkpoint.load("out/run/new.pt")["eliminated"]
    for line in (
        "rewriting out/run/ckpt.pt, step 200\nW_Q = I by Theorem 4.1\n",
        f"layer 0: W_Q has condition number {found['cond'][0]:.4g}",
        f"layer 1: W_Q has condition number {found['cond'][1]:.4g}",
        f"parameters: {found['parameters'][0]:,} → {found['parameters'][1]:,} (-512)",
        "python sample.py --out_dir=out/run --ckpt=new.pt",
        "--wq_identity=True --init_from=out/run/new.pt",
    ):
        assert line in out
    for dtype, tokens in itertools.product(("float64", "float32", "bfloat16"), ("random", "real")):
        row = found[tokens][dtype]
        assert f"  {dtype:<8}  {row['difference']:.2e}, relative {row['relative']:.2e}" in out
        assert math.isfinite(row["difference"])
        assert (row["rounding"] == 0) == (dtype == "float64")
        assert (f"(rounding: up to {row.get('bound', 0):.2e})" in out) == (dtype == "float64")
    assert read_json("out/run/run.json").get("eliminated") is None  # the run's own file stays


def test_one_layer_of_one_stream_and_remark_2(trained, capsys):
    cfg = trained(mlp_skip=True, max_iters=20)
    found = eliminate.eliminate(options(layer=1))
    out = capsys.readouterr().out
    assert "Lemma 8.4" in out
    assert "Remark 2" in out
    assert "--tie_weights=False --init_from" in out
    assert list(found["cond"]) == [1]
    model = checkpoint.build_model(checkpoint.load("out/new/ckpt.pt"))
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight[:16], torch.eye(16))
    untied = dataclasses.replace(cfg, tie_weights=False)
    expected = validation_loss(cfg, "out/run/ckpt.pt")
    assert validation_loss(untied, "out/new/ckpt.pt") == pytest.approx(expected, abs=1e-4)


def test_a_single_head_needs_no_inverse_and_may_have_a_norm(trained, capsys):
    trained(n_head=1, norm="layernorm", mlp_skip=True, max_iters=10)
    found = eliminate.eliminate(options())
    assert found["result"] == "Proposition 4.1"
    assert found["cond"] == {}
    assert "inverts no matrix" in capsys.readouterr().out
    assert found["real"]["float64"]["relative"] < 1e-12


def test_it_says_why_there_are_no_real_tokens(trained, capsys):
    trained(max_iters=1)
    Path("data/tiny").rename("data/gone")
    assert eliminate.eliminate(options())["real"] is None
    out = capsys.readouterr().out
    assert "not compared on validation text: " in out
    assert "data/tiny/train.bin" in out
    Path("data/gone").rename("data/tiny")
    manifest = data.read_manifest("data/tiny")
    manifest["splits"]["val"]["sha256"] = "another"
    data.write_manifest("data/tiny", **{name: value for name, value in manifest.items() if name != "format"})
    assert eliminate.eliminate(options(out="out/newer/ckpt.pt"))["real"] is None
    assert "data/tiny is not the data that the checkpoint was trained on" in capsys.readouterr().out


def test_nanogpt_checkpoints_are_rewritten_too(trained, capsys):
    trained(n_head=1, norm="layernorm", mlp_skip=True, max_iters=10)
    state = checkpoint.load("out/run/ckpt.pt")
    names = "block_size vocab_size n_layer n_head n_embd dropout bias".split()
    arguments = {name: state["model_config"][name] for name in names}
    torch.save({"model": state["model"], "model_args": arguments, "iter_num": 7}, "theirs.pt")
    found = eliminate.eliminate(options(ckpt="theirs.pt", out="ours/ckpt.pt"))
    assert found["real"] is None
    assert found["random"]["float64"]["relative"] < 1e-12
    out = capsys.readouterr().out
    assert "does not name its dataset" in out
    assert "--wq_identity=True --init_from=ours/ckpt.pt" in out
    assert "has no run.json" in out
    assert checkpoint.load("ours/ckpt.pt")["step"] == 7


def test_nothing_is_overwritten(trained, refuses):
    trained(max_iters=1)
    before = Path("out/run/ckpt.pt").read_bytes()
    refuses(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/run/ckpt.pt", words=["out/run/ckpt.pt already exists"])
    Path("out/other").mkdir()
    Path("out/other/run.json").write_text("{}")
    refuses(
        eliminate.main,
        "--ckpt=out/run/ckpt.pt",
        "--out=out/other/new.pt",
        words=["out/other already contains another run"],
    )
    assert not Path("out/other/new.pt").exists()
    assert Path("out/run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        (dict(norm="layernorm"), [], ["norm=layernorm", "Remark 5", "train with wq_identity=True", "fine-tune"]),
        (dict(norm="rmsnorm"), ["--which=k"], ["norm=rmsnorm", "wk_identity=True"]),
        (dict(mlp_skip=True), [], ["one residual stream", "layer="]),
        (dict(wq_identity=True), [], ["wq_identity=True", "already"]),
        (dict(), ["--max_cond=1.5"], ["layer 0", "badly conditioned", "max_cond=1.5"]),
        (dict(norm="layernorm"), [], ["orthogonal", "--heads", "of W_Q and of W_V", "--triangular --layer"]),
        (dict(norm="dyt"), [], ["permutations", "of W_Q and of W_V becomes I, is exact"]),
        (dict(norm="rmsnorm", pos="rope"), [], ["a part of W_V becomes I, and --triangular"]),
        (dict(), ["--heads", "--triangular", "--layer=0"], ["heads and triangular are different ways"]),
        (dict(), ["--heads", "--which=v"], ["heads=True acts on W_Q and W_V of all layers", "at their defaults"]),
        (dict(), ["--triangular"], ["triangular=True acts on one layer", "--layer"]),
        (dict(norm="dyt"), ["--triangular", "--layer=0"], ["norm=dyt"]),
        (dict(qk_norm=True), ["--approximate"], ["qk_norm=True"]),
        (dict(), ["--heads", "--max_cond=1.5"], ["layer 0, W_Q", "badly conditioned", "max_cond=1.5", "--rows=chosen"]),
        (dict(), ["--rows=chosen"], ["rows=chosen", "heads=True"]),
        (dict(pos="rope", wv_identity=True), ["--heads"], ["neither W_Q nor W_V"]),
        (dict(), ["--layer=2"], ["layer must be", "below 2", "got 2"]),
    ],
)
def test_what_cannot_be_rewritten_ends_in_one_line(trained, refuses, changes, arguments, words):
    trained(**changes, max_iters=1)
    refuses(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", *arguments, words=words)
    assert not Path("out/new").exists()


MODERN = dict(norm="rmsnorm", pos="rope", qk_norm=True, mlp_skip=True)


@pytest.mark.parametrize("max_iters", [1, 200])
@pytest.mark.parametrize(
    ("changes", "which", "words"),
    [
        (dict(), "q", ["Theorem 4.1 is not exact", "--approximate"]),
        (dict(mlp_skip=True, share_layers=True), "k", ["Theorem 4.2 is not exact", "undo the changes"]),
        (dict(n_head=1, norm="layernorm"), "q", ["Proposition 4.1 is not exact"]),
    ],
)
def test_another_attention_in_the_code_is_refused(trained, refuses, monkeypatch, changes, which, words, max_iters):
    trained(**changes, max_iters=max_iters)
    project = SelfAttention.project

    def with_the_input_added_to_the_queries(self, x, positions=None):
        q, k, v = project(self, x, positions)
        return q + x.unflatten(-1, (-1, self.d_k)).transpose(1, 2), k, v

    monkeypatch.setattr(SelfAttention, "project", with_the_input_added_to_the_queries)
    arguments = "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", f"--which={which}"
    words = [*words, "must agree up to rounding", "on 8 sequences of random tokens", "nothing is written"]
    refuses(eliminate.main, *arguments, words=words)
    assert not Path("out/new").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "line"),
    [
        (dict(norm="layernorm", mlp_skip=True), ["--heads"], "of W_Q and W_V are I: 512 parameters are known"),
        (dict(norm="dyt", mlp_skip=True, n_kv_head=1), ["--heads"], "of W_Q and W_V are I: 256 parameters are known"),
        (dict(norm="layernorm", mlp_skip=True), ["--heads", "--rows=chosen"], "the chosen 8 rows of each head of W_Q"),
        (dict(norm="rmsnorm", mlp_skip=True, pos="rope"), ["--heads"], "of W_V are I: 256 parameters are known"),
        (
            dict(MODERN, activation="relu_squared"),
            ["--heads", "--rows=chosen"],
            "of W_V are I: 256 parameters are known",
        ),
        (dict(MODERN, wq_identity=True, query_residual="mlp"), ["--heads"], "of W_V are I: 256 parameters are known"),
        (dict(MODERN, activation="swiglu"), ["--triangular", "--layer=1"], "120 of its 256 parameters are 0"),
        (dict(norm="layernorm", mlp_skip=True), ["--triangular", "--layer=1"], "120 of its 256 parameters are 0"),
        (dict(pos="rope"), ["--gauge=balanced"], "W_Q = I by Theorem 4.1"),
        (dict(wq_identity=True, query_residual="linear"), ["--which=q"], "W_Q = I by Theorem 4.1"),
        (dict(), ["--gauge=orthonormal", "--which=k"], "W_K = I by Theorem 4.1"),
    ],
)
def test_what_is_exact_in_models_with_norms(trained, command, changes, arguments, line):
    cfg = trained(**changes)
    status, out, error = command(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", *arguments)
    assert (status, error) == (0, "")
    assert line in out
    new = checkpoint.load("out/new/ckpt.pt")
    options = {name: value for name, value in new["model_config"].items() if value != getattr(cfg, name)}
    assert {"norm": cfg.norm} | options == {"norm": cfg.norm} | {
        "--heads": {},
        "--triangular": {"norm": "rmsnorm", "tie_weights": False},
        "--gauge=balanced": {"wq_identity": True},
        "--gauge=orthonormal": {"wk_identity": True},
        "--which=q": {"query_residual": None},
    }[arguments[0]]
    after = validation_loss(dataclasses.replace(cfg, **options), "out/new/ckpt.pt")
    assert after == pytest.approx(validation_loss(cfg, "out/run/ckpt.pt"), abs=1e-3)
    assert new["eliminated"]["heads"] == ("--heads" in arguments)


def test_a_difference_on_validation_text_alone_is_refused(trained, refuses, monkeypatch):
    trained(max_iters=1)
    bounds = iter((1.0, 0.0))
    monkeypatch.setattr(verification, "rounding_bound", lambda *_: next(bounds))
    words = ["on 31 validation windows", "nothing is written"]
    refuses(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", words=words)
    assert not Path("out/new").exists()


def test_a_difference_that_is_not_a_number_is_refused(trained, refuses, monkeypatch):
    trained(max_iters=1)
    rewritten = reparametrize.eliminate

    def with_a_nan(*arguments):
        model = rewritten(*arguments)
        model.transformer.wpe.weight.data[3] = math.nan
        return model

    monkeypatch.setattr(reparametrize, "eliminate", with_a_nan)
    refuses(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", words=["got nan on 8 sequences"])


def test_an_option_that_theory_does_not_know_is_refused(trained, refuses, monkeypatch):
    trained(max_iters=1)
    monkeypatch.delitem(weights.OPTIONS, "mlp_skip")
    words = ["got mlp_skip=False, not at its default, True", "theory/weights.py"]
    for arguments in ([], ["--approximate"], ["--gauge=balanced"]):
        refuses(eliminate.main, "--ckpt=out/run/ckpt.pt", "--out=out/new/ckpt.pt", *arguments, words=words)
    assert not Path("out/new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--ckpt="]),
        (["--ckpt=a.pt"], ["--out="]),
        (["--ckpt=a.pt", "--out=b.pt"], ["there is no checkpoint a.pt"]),
        (["--ckpt=a.pt", "--out=b.pt", "--which=o"], ["which", "q, k, v"]),
        (["--ckpt=a.pt", "--out=b.pt", "--max_cond=0"], ["max_cond"]),
        (["--ckpt=a.pt", "--out=b.pt", "--windows=0"], ["windows"]),
        (["--ckpt=a.pt", "--out=b.pt", "--layers=1"], ["did you mean layer?"]),
    ],
)
def test_mistakes_end_in_one_line(tiny, refuses, arguments, words):
    refuses(eliminate.main, *arguments, words=words)


def test_a_singular_projection_is_refused_with_its_layer(trained, refuses):
    trained(max_iters=1)
    state = checkpoint.load("out/run/ckpt.pt")
    state["model"]["transformer.h.1.attn.c_attn.weight"][3] = 0
    checkpoint.save("out/run/singular.pt", **{name: value for name, value in state.items() if name != "format"})
    refuses(eliminate.main, "--ckpt=out/run/singular.pt", "--out=out/new/ckpt.pt", words=["layer 1", "W_Q is singular"])


def test_help_names_every_field():
    text = configurator.describe(eliminate.EliminateConfig)
    assert all(f"--{field.name}=" in text for field in dataclasses.fields(eliminate.EliminateConfig))
