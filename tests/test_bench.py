"""The benchmark: fair turns, honest limits, every row that is asked for, and a plan that adds up."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
from engine import decode, devices
from engine.flops import cost
from model import GPT, GPTConfig
from speed import hardware, profiling, timing

CPU = torch.device("cpu")
QUICK = ["--repeats=3", "--warmup=1", "--min_seconds=0", "--decode_tokens=6", "--decode_prompt=3", "--decode_batch=2"]
H100 = "NVIDIA H100 80GB HBM3"


def options(**fields):
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The device's limit from a small product: here it is only a number."""
    monkeypatch.setattr(
        hardware, "matrix_product_flops", lambda device, dtype, of=hardware.matrix_product_flops: of(device, dtype, 64)
    )


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Makes BenchConfigs of a tiny model in an empty working directory, without a dataset unless they name one."""
    monkeypatch.chdir(tmp_path)
    quickly = dict(repeats=3, warmup=1, min_seconds=0.0, decode_tokens=6, decode_prompt=3, decode_batch=2)
    return lambda **changes: bench.BenchConfig(**{**TINY, **quickly, "device": "cpu", **changes})


# Turns


class Machine:
    """A clock, and works that take time on it; the machine becomes slower with every turn."""

    def __init__(self, **durations):
        self.now, self.slowness, self.order = 0.0, 1.0, []
        self.works = {name: self.work(name, duration) for name, duration in durations.items()}

    def work(self, name, duration):
        def call():
            self.order.append(name)
            self.now += duration * self.slowness

        return timing.Work(timing.Arm(name, CPU), call, tokens=100)

    def run(self, drift=1.0, **arguments):
        def clock():
            self.slowness *= drift ** (1 / (2 * len(self.works)))  # a round reads it twice a turn
            return self.now

        return timing.interleave(self.works, clock=clock, **arguments)


def test_turns_alternate_and_a_speed_is_tokens_a_second():
    machine = Machine(a=2.0, b=4.0)
    timings = machine.run(repeats=3, warmup=2)
    assert "".join(machine.order) == "aabb" + "ab" * 3
    assert timings["a"].rates == [50.0] * 3
    assert timings["b"].rates == [25.0] * 3
    assert timing.ratios(timings["a"], timings["b"]) == [2.0] * 3


@settings(max_examples=30)
@given(drift=st.floats(0.5, 2.0), faster=st.floats(0.2, 5.0))
def test_a_ratio_is_of_turns_of_one_round_so_that_a_drifting_machine_hardly_changes_it(drift, faster):
    machine = Machine(a=1.0, b=faster)
    timings = machine.run(drift=drift, repeats=5)
    ratios = timing.ratios(timings["a"], timings["b"])
    assert ratios == pytest.approx([faster * drift**0.5] * 5)  # half a round lies between the two turns
    rates = timings["a"].rates
    assert rates[0] / rates[4] == pytest.approx(drift**4)


def test_a_turn_has_as_many_calls_as_the_fastest_needs():
    machine = Machine(a=0.3, b=2.0)
    timings = machine.run(repeats=2, warmup=0, min_seconds=1.0)
    assert "".join(machine.order) == "ab" + ("a" * 4 + "b" * 4) * 2
    assert timings["a"].rates == pytest.approx([100 / 0.3] * 2)
    assert {timing_.calls for timing_ in timings.values()} == {4}


def test_peak_memory_is_that_of_one_model(monkeypatch):
    held, peak = {}, [0]
    monkeypatch.setattr(devices, "allocated_bytes", lambda device: sum(held.values()))
    monkeypatch.setattr(devices, "reset_peak_memory", lambda device: peak.__setitem__(0, sum(held.values())))
    monkeypatch.setattr(devices, "peak_memory_bytes", lambda device: peak[0])
    monkeypatch.setattr(hardware, "synchronise", lambda device: None)

    def work(name, weights, state, temporary):
        held[name] = weights

        def call():
            held[name] = weights + state  # the first step makes the optimizer's state
            peak[0] = max(peak[0], sum(held.values()) + temporary)

        return timing.Work(timing.Arm(name, torch.device("cuda"), resident=weights), call, tokens=1)

    works = {"a": work("a", 100, 200, 50), "b": work("b", 1000, 2000, 500)}
    timings = timing.interleave(works, repeats=3, warmup=1)
    assert {name: timed.peak_bytes for name, timed in timings.items()} == {"a": 350, "b": 3500}


def test_the_middle_half():
    assert timing.middle([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)
    assert timing.middle([7.0]) == (7.0, 7.0, 7.0)


# Limits


def test_utilisation_is_that_of_the_public_formula():
    """nanoGPT's 6 N + 12 L H Q T, its N without positions; 489,700 tokens/s are the public 42.3 % of an H200."""
    flops = cost(GPTConfig()).training_flops
    assert flops == 6 * (84_934_656 + 50_304 * 768) + 12 * 12 * 768 * 1024
    share = timing.utilisation(489_700, flops, hardware.peak_flops("NVIDIA H200", torch.bfloat16))
    assert share == pytest.approx(0.423, abs=5e-4)


@pytest.mark.parametrize("name", ["", "NVIDIA H100", f"{H100} MIG 1g.10gb", "Intel(R) Xeon(R) Processor", "H100"])
def test_an_unknown_device_has_no_peak_and_no_utilisation(name):
    assert hardware.peak_flops(name, torch.bfloat16) is None
    assert timing.utilisation(1000.0, 1e9, None) is None


def test_a_peak_is_that_of_the_number_format(monkeypatch):
    assert hardware.peak_flops(H100, torch.bfloat16) == 989.4e12
    assert hardware.peak_flops(H100, torch.float32) is None  # without tensor cores: not in the table
    assert hardware.peak_flops(H100, torch.float64) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hardware.peak_flops(H100, torch.float32) == 494.7e12


def test_the_attention_backend_is_the_one_that_ran():
    config = GPTConfig(block_size=32, n_head=4, n_embd=64)
    assert hardware.attention_backend(CPU, torch.float32, config) == "FlashAttention"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert hardware.attention_backend(CPU, torch.float32, config) == "plain"


# Where the time goes


NAMES = {
    "attention": [
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_29_64x128x64",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>",
        "fmha_cutlassB_bf16_aligned_128x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)",
    ],
    "matrix products": [
        "aten::mm",
        "aten::addmm",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "triton_tem_fused_mm_4",
        "mkldnn::_linear_pointwise",
    ],
    "cross-entropy": [
        "aten::_log_softmax",
        "aten::nll_loss_forward",
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward_5",
        "void at::native::cunn_SoftMaxForward<8, float, float, float, LogSoftMaxForwardEpilogue>",
    ],
    "optimizer": [
        "aten::_fused_adamw_",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        "aten::_foreach_norm",
        "aten::linalg_vector_norm",
    ],
    "normalisation": [
        "aten::native_layer_norm_backward",
        "triton_per_fused__to_copy_add_native_layer_norm_2",
        "void at::native::vectorized_layer_norm_kernel<float, float>",
    ],
    "activation": [
        "aten::gelu",
        "triton_poi_fused_gelu_gelu_backward_7",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
    ],
    "copies": [
        "aten::copy_",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "triton_poi_fused__to_copy_3",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>",
    ],
    "other": ["aten::add", "aten::embedding_dense_backward", "aten::softmax", "aten::norm", "aten::sum"],
}


def test_kinds_of_operations():
    assert set(NAMES) == {*profiling.KINDS, "other"}
    for kind, names in NAMES.items():
        for name in names:
            assert profiling.kind_of(name) == kind, name


@settings(max_examples=50)
@given(
    durations=st.lists(
        st.tuples(st.sampled_from([name for names in NAMES.values() for name in names]), st.floats(0.001, 10)),
        min_size=1,
    ),
    idle=st.floats(0, 100),
)
def test_shares_add_up(durations, idle):
    busy = sum(duration for _, duration in durations)
    on_cpu, on_gpu = profiling.shares(durations), profiling.shares(durations, wall=busy + idle)
    assert sum(on_cpu.values()) == pytest.approx(1)
    assert sum(on_gpu.values()) == pytest.approx(1)
    assert on_gpu["idle"] == pytest.approx(idle / (busy + idle), abs=1e-9)
    assert "idle" not in on_cpu


# The command


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
        assert row["of_peak"] is None and row["peak_bytes"] is None  # nobody knows them of this device
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
    for words in ("datasheet peak: n/a", "power cap: n/a", "torch " + torch.__version__, "random", "middle half"):
        assert words in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ") and "[" in line}) == 1


def test_only_what_is_asked_for_on_the_data_that_is_there(quick, tiny):
    tiny()
    result = bench.bench(quick(only=("decode",), decode_batch=1))
    assert {row["what"] for row in result["rows"]} == {"decoding, batch 1"}
    assert result["header"]["data"] == "data/tiny"
    block_weights = 4 * 2 * 12 * 16**2  # bytes: float32, two layers of 12 n_embd²
    assert f"{block_weights / 1e6:.2f} MB" in result["notes"][0]
    assert "8.3% fewer" in result["notes"][0]  # W_Q is 1/12 of a block


def test_a_mixture_is_compared_with_its_active_experts(quick):
    result = bench.bench(quick(n_expert=4, n_expert_active=2, only=("train", "eval")))
    by_name = {(row["what"], row["model"]): row for row in result["rows"]}
    assert ("evaluation", "active experts") not in by_name
    ideal = GPTConfig(**{k: v for k, v in TINY.items() if k in GPTConfig.__dataclass_fields__}, mlp_ratio=8)
    assert by_name["training step", "active experts"]["flops"] == cost(ideal).training_flops
    ratio = by_name["training step", "active experts"]["over baseline"][0]
    assert any(f"takes {ratio:.2f}" in note and "ideal MLP of the 2 active" in note for note in result["notes"])


def test_an_encoder_decodes_nothing(quick):
    result = bench.bench(quick(causal=False, objective="mlm", only=("eval", "decode")))
    assert {row["what"] for row in result["rows"]} == {"evaluation"}
    assert any("encoder" in note for note in result["notes"])


def test_the_step_is_a_trainer_s_step(quick, tmp_path):
    """Timed steps move the weights as a run's steps do: the same data, optimizer and clipping."""
    cfg = quick()
    timed = bench.timed_config(cfg, tmp_path)
    timed_model, run = (bench.Model(name, timed) for name in ("timed", "run"))
    for _ in range(3):
        timed_model.training().call()
    for x, y in itertools.islice(run.run.batches(), 3):
        run.run.update(x, y)
    for name, parameter in run.run.model.named_parameters():
        assert torch.equal(parameter, timed_model.run.model.get_parameter(name))
    assert timed_model.training().tokens == timed_model.run.n_sequences * timed.block_size


def test_the_peer_has_our_size_and_decodes_what_it_computes(quick, tmp_path):
    pytest.importorskip("transformers")
    cfg = quick(peer=("hf",))
    timed = bench.timed_config(cfg, tmp_path)
    model = bench.make_models(cfg, timed)["Hugging Face"].run.model.eval()
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
    # In the place of the clone stands a model with the same interface, whose numbers are ours.
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
    ours, theirs = models["baseline"].run, models["nanoGPT"].run
    theirs.model.gpt.load_state_dict(ours.model.state_dict())
    for run in (ours, theirs):
        run.model.eval()
    x, y = next(models["baseline"].batches)
    with torch.no_grad():
        torch.testing.assert_close(theirs.model(x, y)[1], ours.model(x, y)[1])
        torch.testing.assert_close(theirs.model(x, y, "none")[1].mean(), ours.model(x, y, "none")[1].mean())
        compiled = torch.compile(theirs.model, backend="eager")
        torch.testing.assert_close(compiled(x, y)[1], ours.model(x, y)[1])


def test_each_precision_is_measured_by_its_own_limit(quick, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(hardware, "peak_flops", lambda name, dtype: {torch.float32: 1e12, torch.bfloat16: 1e13}[dtype])
    result = bench.bench(quick(peer=("hf",), peer_dtype="bfloat16", only=("train",)))
    for row, peak in zip(result["rows"], (1e12, 1e12, 1e13), strict=True):
        assert row["of_peak"] == pytest.approx(row["tokens_per_second"] * row["flops"] / peak)
    assert "TFLOP/s in bfloat16, " in result["header"]["large matrix product"]
    assert any("same optimizer, in bfloat16" in note for note in result["notes"])


def test_decoding_is_in_the_precision_that_sampling_would_choose(quick, tmp_path, monkeypatch):
    choose = devices.choose_dtype

    def choose_dtype(name, device, config, n_decoded=None, compiled=False):
        return torch.bfloat16 if name == "auto" and n_decoded == 3 else choose(name, device, config)

    monkeypatch.setattr(devices, "choose_dtype", choose_dtype)
    timed = bench.timed_config(quick(dtype="auto"), tmp_path)
    model, seen = bench.Model("baseline", timed), []
    model.run.model.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    for batch_size, dtype in ((3, torch.bfloat16), (1, torch.float32)):
        seen.clear()
        work = model.decoding(quick(), batch_size)
        work.call()
        assert work.dtype == dtype and set(seen) == {dtype}
    assert model.training().dtype == torch.float32


def test_the_uncached_loop_gives_the_tokens_of_the_cached_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=97, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(97, (2, 4))
    with torch.no_grad():
        assert torch.equal(bench.uncached(model, idx, 15), decode.generate(model, idx, 15, temperature=0))


# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only=train,decod"], ["only", "decod", "decode"]),
        (["--repeats=0"], ["repeats", 1]),
        (["--min_seconds=-1"], ["min_seconds"]),
        (["--resume"], ["resume", "leave it out"]),
        (["--init_from=some.pt"], ["init_from"]),
        (["--decode_tokens=20"], ["decode_tokens=20", "block_size=16"]),
        (["--measured=speed.json"], ["--plan"]),
        (["--plan", "--measured=nowhere.json"], ["nowhere.json", "python bench.py"]),
        (["--peer=hf", "--norm=rmsnorm"], ["peer=hf", "norm=layernorm", "rmsnorm"]),
        (["--json=nowhere/speed.json"], ["json", "no folder nowhere"]),
        (["--peer_dtype=float32"], ["peer_dtype", "--peer=hf"]),
        (["--peer=nanogp"], ["peer", "did you mean 'nanogpt'"]),
        (["--nanogpt=nowhere"], ["--peer=nanogpt"]),
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
    refuses(bench.main, *options(**{k: v for k, v in TINY.items() if k != "save_steps"}), *QUICK, *argv, words=words)


def test_it_is_one_process(refuses, monkeypatch):
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
