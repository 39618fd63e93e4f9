"""Interleaved turns and their ratios, the limits of devices, profiles by kind of operation, and bench_prepare."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import devices
from engine.flops import cost
from model import GPTConfig
from speed import bench_prepare, hardware, profiling, timing

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"

# Turns


class Machine:
    """A simulated clock, and workloads that take time on it; the machine becomes slower with every turn."""

    def __init__(self, **durations):
        self.now, self.slowness, self.order = 0.0, 1.0, []
        self.workloads = {name: self.workload(name, duration) for name, duration in durations.items()}

    def workload(self, name, duration):
        def call():
            self.order.append(name)
            self.now += duration * self.slowness

        return timing.Workload(timing.TimedModel(name, CPU), call, tokens=100)

    def run(self, drift=1.0, **arguments):
        def clock():
            self.slowness *= drift ** (1 / (2 * len(self.workloads)))  # each turn reads the clock twice
            return self.now

        return timing.interleave(self.workloads, clock=clock, **arguments)


def test_turns_alternate_and_a_rate_is_in_tokens_per_second():
    machine = Machine(a=2.0, b=4.0)
    timings = machine.run(repeats=3, warmup=2)
    assert "".join(machine.order) == "aabb" + "ab" * 3
    assert timings["a"].rates == [50.0] * 3
    assert timings["b"].rates == [25.0] * 3
    assert timing.ratios(timings["a"], timings["b"]) == [2.0] * 3


@settings(max_examples=30)
@given(drift=st.floats(0.5, 2.0), faster=st.floats(0.2, 5.0))
def test_a_ratio_is_of_turns_in_one_round_so_that_a_drifting_machine_hardly_changes_it(drift, faster):
    machine = Machine(a=1.0, b=faster)
    timings = machine.run(drift=drift, repeats=5)
    ratios = timing.ratios(timings["a"], timings["b"])
    assert ratios == pytest.approx([faster * drift**0.5] * 5)  # the two turns are half a round apart
    rates = timings["a"].rates
    assert rates[0] / rates[4] == pytest.approx(drift**4)


def test_a_turn_has_as_many_calls_as_the_fastest_needs_for_min_seconds():
    machine = Machine(a=0.3, b=2.0)
    timings = machine.run(repeats=2, warmup=0, min_seconds=1.0)
    assert "".join(machine.order) == "ab" + ("a" * 4 + "b" * 4) * 2
    assert timings["a"].rates == pytest.approx([100 / 0.3] * 2)
    assert {timed.calls for timed in timings.values()} == {4}


def test_peak_memory_is_that_of_one_model(monkeypatch):
    allocated, peak = {}, [0]
    monkeypatch.setattr(devices, "allocated_bytes", lambda device: sum(allocated.values()))
    monkeypatch.setattr(devices, "reset_peak_memory", lambda device: peak.__setitem__(0, sum(allocated.values())))
    monkeypatch.setattr(devices, "peak_memory_bytes", lambda device: peak[0])
    monkeypatch.setattr(hardware, "synchronise", lambda device: None)

    def workload(name, weights, state, temporary):
        allocated[name] = weights

        def call():
            allocated[name] = weights + state  # the first step creates the optimizer's state
            peak[0] = max(peak[0], sum(allocated.values()) + temporary)

        return timing.Workload(timing.TimedModel(name, torch.device("cuda"), resident=weights), call, tokens=1)

    workloads = {"a": workload("a", 100, 200, 50), "b": workload("b", 1000, 2000, 500)}
    timings = timing.interleave(workloads, repeats=3, warmup=1)
    assert {name: timed.peak_bytes for name, timed in timings.items()} == {"a": 350, "b": 3500}


def test_median_and_interquartile_range():
    assert timing.median_and_iqr([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)
    assert timing.median_and_iqr([7.0]) == (7.0, 7.0, 7.0)


# Limits


def test_utilisation_is_that_of_the_published_formula():
    """nanoGPT's 6 N + 12 L H Q T, with N without positions; 489,700 tokens/s are the published 42.3 % of an H200."""
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
    assert hardware.peak_flops(H100, torch.float32) is None  # runs without tensor cores, whose peak alone is listed
    assert hardware.peak_flops(H100, torch.float64) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hardware.peak_flops(H100, torch.float32) == 494.7e12


def test_the_attention_backend_is_the_one_that_ran():
    config = GPTConfig(block_size=32, n_head=4, n_embd=64)
    assert hardware.attention_backend(CPU, torch.float32, config) == "FlashAttention"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert hardware.attention_backend(CPU, torch.float32, config) == "math"


# Profiles


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
    on_cpu, on_gpu = profiling.time_shares(durations), profiling.time_shares(durations, wall=busy + idle)
    assert sum(on_cpu.values()) == pytest.approx(1)
    assert sum(on_gpu.values()) == pytest.approx(1)
    assert on_gpu["idle"] == pytest.approx(idle / (busy + idle), abs=1e-9)
    assert "idle" not in on_cpu


# Preparing data


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gather_gigabytes=1"], "--gather_gigabytes has an effect only with --gather"),
        (["--gather", "--megabytes=5"], "--megabytes has an effect only without --gather"),
        (["--repeats=0"], "repeats must be positive, got 0"),
        (["--out_dir=."], "--out_dir must name a new folder"),
    ],
    ids=str,
)
def test_a_mistake_of_bench_prepare_ends_in_one_line(refuses, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    refuses(bench_prepare.main, *argv, words=[words])
