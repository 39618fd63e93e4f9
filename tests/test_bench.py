"""The benchmark command: it measures every row that is asked for, and refuses what it would ignore."""

import dataclasses
import itertools
import json
import resource
from pathlib import Path

import pytest
import torch
from conftest import TINY

import bench
import cost as cost_command
from engine import decode, devices
from engine.flops import cost
from model import GPT, GPTConfig
from speed import hardware

SHORT = dict(repeats=3, warmup=1, min_seconds=0.0, decode_tokens=6, decode_prompt=3, decode_batch=2)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Measure the device's limit with a small product, which takes less time."""
    monkeypatch.setattr(
        hardware, "matrix_product_flops", lambda device, dtype, of=hardware.matrix_product_flops: of(device, dtype, 64)
    )


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Makes BenchConfigs of a tiny model; the working directory has no dataset unless the fixture tiny writes one."""
    monkeypatch.chdir(tmp_path)
    return lambda **changes: bench.BenchConfig(**{**TINY, **SHORT, "device": "cpu", **changes})


@pytest.fixture
def full_disk():
    """Lets no file grow above 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The command


@pytest.mark.parametrize(
    ("has_data", "words"),
    [(False, "train.bin: File too large"), (True, "cannot write the trace .*baseline.json: is the")],
)
def test_a_full_disk_is_one_line(quick, request, full_disk, has_data, words):
    if has_data:
        request.getfixturevalue("tiny")
    with pytest.raises(ValueError, match=words):
        bench.bench(quick(only=("train",), profile=True, out_dir="out", repeats=1))
    assert list(Path().glob("out/*")) == []


def test_the_json_file_is_no_folder(quick):
    with pytest.raises(ValueError, match="--json must name a file, got the folder"):
        bench.bench(quick(json="."))


def test_every_row_that_is_asked_for(quick, tmp_path, capsys):
    pytest.importorskip("transformers")
    cfg = quick(
        peer=("hf",), uncached=True, json=str(tmp_path / "speed.json"), out_dir=str(tmp_path / "out"), profile=True
    )
    bench.bench(cfg)
    result = json.loads((tmp_path / "speed.json").read_text())
    three, decoding = ["baseline", "reduced", "Hugging Face"], ["decoding, batch 1", "decoding, batch 2"]
    expected = [(what, model) for what in ("training step", "evaluation") for model in three]
    expected += [(what, model) for what in decoding for model in [*three, "baseline, no cache"]]
    assert [(row["what"], row["model"]) for row in result["rows"]] == [*expected, ("loader alone", "all")]
    for row in result["rows"]:
        assert len(row["rates"]) == 3 and min(row["rates"]) > 0
        assert row["of_peak"] is None and row["peak_bytes"] is None  # unknown on a CPU
        assert (row["of_product"] is None) == (row["model"] in ("baseline, no cache", "all"))
        for reference in ("baseline", "Hugging Face"):
            assert (f"over {reference}" in row) == (row["what"] != "loader alone" and row["model"] != reference)
    by_name = {(row["what"], row["model"]): row for row in result["rows"]}
    ours, theirs = (by_name["training step", name]["rates"] for name in ("reduced", "Hugging Face"))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    assert by_name["training step", "reduced"]["over Hugging Face"][0] == pytest.approx(ratios[1])
    for name, shares in result["profile"].items():
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[kind] for kind in ("attention", "matrix products", "optimizer", "cross-entropy")) > 0
        trace = json.loads((tmp_path / "out" / f"trace_{name}.json").read_text())
        assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    for words in ("datasheet peak: n/a", "power cap: n/a", f"torch {torch.__version__}", "random", "interquartile"):
        assert words in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ") and "[" in line}) == 1


def test_only_what_is_asked_for_on_the_data_that_is_there(quick, tiny):
    tiny()
    result = bench.bench(quick(only=("decode",), decode_batch=1))
    assert {row["what"] for row in result["rows"]} == {"decoding, batch 1"}
    assert result["header"]["data"] == "data/tiny"
    block_weights = 4 * 2 * 12 * 16**2  # bytes: float32, two layers of 12 · n_embd² weights
    assert f"{block_weights / 1e6:.2f} MB" in result["notes"][0]
    assert "8.3% less" in result["notes"][0]  # W_Q is 1/12 of a block


def test_a_mixture_of_experts_is_compared_with_its_active_ones(quick):
    result = bench.bench(quick(n_expert=4, n_expert_active=2, only=("train", "eval")))
    by_name = {(row["what"], row["model"]): row for row in result["rows"]}
    assert ("evaluation", "active experts") not in by_name
    ideal = GPTConfig(**{k: v for k, v in TINY.items() if k in GPTConfig.__dataclass_fields__}, mlp_ratio=8)
    assert by_name["training step", "active experts"]["flops"] == cost(ideal).training_flops
    ratio = by_name["training step", "active experts"]["over baseline"][0]
    assert any(f"takes {ratio:.2f}" in note and "ideal MLP of only the 2 active" in note for note in result["notes"])


def test_an_encoder_decodes_nothing(quick):
    result = bench.bench(quick(causal=False, objective="mlm", only=("eval", "decode")))
    assert {row["what"] for row in result["rows"]} == {"evaluation"}
    assert any("encoder" in note for note in result["notes"])


def test_a_timed_step_is_a_trainer_s_step(quick, tmp_path):
    """Timed steps give the same weights as a run's steps: the data, the optimizer and clipping are the same."""
    cfg = quick()
    timed = bench.timed_config(cfg, tmp_path)
    timed_model, trainer = bench.BenchModel("timed", timed), bench.BenchModel("run", timed).trainer
    for _ in range(3):
        timed_model.training().call()
    for x, y in itertools.islice(trainer.batches(), 3):
        trainer.update(x, y)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, timed_model.trainer.model.get_parameter(name))
    assert timed_model.training().tokens == trainer.n_sequences * timed.block_size


def test_hugging_face_s_gpt2_has_our_size_and_decodes_greedily(quick, tmp_path):
    pytest.importorskip("transformers")
    cfg = quick(peer=("hf",))
    timed = bench.timed_config(cfg, tmp_path)
    model = bench.make_models(cfg, timed)["Hugging Face"].trainer.model.eval()
    ours = GPT(dataclasses.replace(timed.model_config(), bias=True))
    assert sum(p.numel() for p in model.parameters()) == ours.num_params().total
    idx = torch.randint(timed.vocab_size, (2, 3))
    tokens = model.generate(idx, 8)
    assert tokens.shape == (2, 11)
    with torch.no_grad():
        logits = model.gpt2(tokens).logits
        _, losses = model(tokens[:, :-1], tokens[:, 1:], reduction="none")
        _, loss = model(tokens, tokens)
    assert torch.equal(logits[:, 2:-1].argmax(dim=-1), tokens[:, 3:])
    torch.testing.assert_close(losses.mean(), loss)


NANOGPT = """
import sys, dataclasses
sys.path.insert(0, {here!r})
import torch, model

@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

def same(x):
    return x

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**dataclasses.asdict(config)))
        print("number of parameters: some")

    def forward(self, idx, targets=None):
        return super().forward(same(idx), targets)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        assert top_k == 1
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        return idx
"""


def test_a_clone_of_nanogpt_is_a_peer(quick, tmp_path, capsys):
    # This model stands in for the clone: it has nanoGPT's interface and computes what ours does.
    (tmp_path / "model.py").write_text(NANOGPT.format(here=str(Path(bench.__file__).parent)))
    cfg = quick(peer=("nanogpt",), nanogpt=str(tmp_path), only=("train", "eval", "decode"))
    result = bench.bench(cfg)
    rows = {(row["what"], row["model"]): row for row in result["rows"]}
    for what in ("training step", "evaluation", "decoding, batch 1", "decoding, batch 2"):
        assert rows[what, "baseline"]["over nanoGPT"][0] > 0
    assert rows["decoding, batch 1", "nanoGPT"]["flops"] is None and rows["training step", "nanoGPT"]["flops"] > 0
    printed = capsys.readouterr().out
    assert "times nanoGPT" in printed and "number of parameters" not in printed
    models = bench.make_models(cfg, bench.timed_config(cfg, tmp_path))
    ours, theirs = models["baseline"].trainer.model.eval(), models["nanoGPT"].trainer.model.eval()
    theirs.gpt.load_state_dict(ours.state_dict())
    x, y = next(models["baseline"].batches)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, y)[1], ours(x, y)[1])
        torch.testing.assert_close(theirs(x, y, "none")[1].mean(), ours(x, y, "none")[1].mean())
        compiled = torch.compile(theirs, backend="eager")
        torch.testing.assert_close(compiled(x, y)[1], ours(x, y)[1])


def test_each_dtype_is_compared_with_its_own_peak(quick, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(hardware, "peak_flops", lambda name, dtype: {torch.float32: 1e12, torch.bfloat16: 1e13}[dtype])
    result = bench.bench(quick(peer=("hf",), peer_dtype="bfloat16", only=("train",)))
    for row, peak in zip(result["rows"], (1e12, 1e12, 1e13), strict=True):
        assert row["of_peak"] == pytest.approx(row["tokens_per_second"] * row["flops"] / peak)
    assert "TFLOP/s in bfloat16, " in result["header"]["large matrix product"]
    assert any("same optimizer, in bfloat16" in note for note in result["notes"])


def test_decoding_is_in_the_dtype_that_sample_py_would_choose(quick, tmp_path, monkeypatch):
    choose = devices.choose_dtype

    def choose_dtype(name, device, config, n_decoded=None, compiled=False):
        return torch.bfloat16 if name == "auto" and n_decoded == 3 else choose(name, device, config)

    monkeypatch.setattr(devices, "choose_dtype", choose_dtype)
    timed = bench.timed_config(quick(dtype="auto"), tmp_path)
    model, seen = bench.BenchModel("baseline", timed), []
    model.trainer.model.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    for batch_size, dtype in ((3, torch.bfloat16), (1, torch.float32)):
        seen.clear()
        workload = model.decoding(quick(), batch_size)
        workload.call()
        assert workload.dtype == dtype and set(seen) == {dtype}
    assert model.training().dtype == torch.float32


def test_decoding_without_a_cache_gives_the_same_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=97, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(97, (2, 4))
    with torch.no_grad():
        assert torch.equal(bench.generate_uncached(model, idx, 15), decode.generate(model, idx, 15, temperature=0))


def test_help_begins_with_the_command_s_own_docstring(command):
    for module in (bench, cost_command):
        status, out, _ = command(module.main, "--help")
        assert status == 0 and out.startswith(module.__doc__.strip())


# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only=train,decod"], ["only", "decod", "decode"]),
        (["--repeats=0"], ["repeats", "0"]),
        (["--min_seconds=-1"], ["min_seconds", "-1"]),
        (["--resume"], ["resume=False, got True", "leave --resume out"]),
        (["--init_from=some.pt"], ["init_from=scratch, got some.pt"]),
        (["--decode_tokens=20"], ["decode_tokens", "block_size=16, got 3 + 20"]),
        (["--only=train", "--uncached"], ["--uncached needs decode in --only, got train"]),
        (["--measured=speed.json"], ["--measured needs --plan"]),
        (["--plan", "--profile"], ["--plan measures nothing", "leave --profile out"]),
        (["--plan", "--measured=nowhere.json"], ["nowhere.json", "python bench.py"]),
        (["--peer=hf", "--norm=rmsnorm"], ["--peer=hf needs norm=layernorm, got rmsnorm"]),
        (["--json=nowhere/speed.json"], ["--json=nowhere/speed.json", "no folder nowhere"]),
        (["--peer_dtype=float32"], ["--peer_dtype needs a peer", "--peer=hf"]),
        (["--peer=nanogp"], ["peer", "did you mean 'nanogpt'"]),
        (["--nanogpt=nowhere"], ["--nanogpt needs --peer=nanogpt"]),
        (["--peer=nanogpt", "--nanogpt=nowhere"], ["nowhere/model.py", "git clone", "--nanogpt="]),
        (["--repeat=3"], ["repeat", "did you mean repeats"]),
        (["--wk_identity", "--wv_identity"], ["wq_identity"]),
    ],
    ids=str,
)
def test_a_mistake_ends_in_one_line(refuses, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    if "--norm=rmsnorm" in argv:
        pytest.importorskip("transformers")
    values = TINY if "--plan" in argv else TINY | SHORT
    options = [f"--{name}={value}" for name, value in values.items() if name != "save_steps"]
    refuses(bench.main, *options, *argv, words=words)


def test_only_one_process_is_measured(refuses, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(bench.main, words=["torchrun"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(quick, tmp_path):
    result = bench.bench(quick(device="cuda", dtype="bfloat16", profile=True, out_dir=str(tmp_path / "out")))
    assert "kernel" in result["header"]["attention"]
    assert all(row["peak_bytes"] > 0 for row in result["rows"] if row["what"] != "loader alone")
    for shares in result["profile"].values():
        assert shares["idle"] > 0 and shares["matrix products"] > 0
        assert sum(shares.values()) == pytest.approx(1)
