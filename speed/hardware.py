"""What a device can reach: the FLOP/s of its datasheet, where that is known, and those of a large matrix product."""

import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.nn import functional as F

from engine import devices, runlog

# A part of the operation's name -> the backend of scaled_dot_product_attention, as torch.nn.attention calls it.
ATTENTION_BACKENDS = {"cudnn": "cuDNN", "flash": "FlashAttention", "efficient": "memory-efficient", "math": "math"}


@dataclass(frozen=True)
class Datasheet:
    """What the maker of a GPU states. FLOP/s are dense (without sparsity), with sums in float32."""

    peak: dict  # 'bfloat16', 'float16' or 'tf32' -> FLOP/s; tf32 is for products of float32 tensors, where allowed
    memory: float  # bytes
    source: str


def _datasheet(tflops_16bit, tflops_tf32, gigabytes, source):
    """A Datasheet from TFLOP/s of the tensor cores and GB of memory."""
    peak = {"bfloat16": tflops_16bit * 1e12, "float16": tflops_16bit * 1e12, "tf32": tflops_tf32 * 1e12}
    return Datasheet(peak, gigabytes * 1e9, source)


_H100 = "NVIDIA H100 Tensor Core GPU datasheet (half of the figures with sparsity)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (half of the figures with sparsity)"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
# By the name that torch.cuda.get_device_name gives, which must match exactly: a MIG slice of a GPU, or another model of
# a similar name, has other figures.
DATASHEETS = {
    "NVIDIA H200": _datasheet(989.4, 494.7, 141, _H200),
    "NVIDIA H100 80GB HBM3": _datasheet(989.4, 494.7, 80, _H100),
    "NVIDIA H100 PCIe": _datasheet(756.5, 378, 80, _H100),
    "NVIDIA A100-SXM4-80GB": _datasheet(312, 156, 80, _A100),
    "NVIDIA A100-SXM4-40GB": _datasheet(312, 156, 40, _A100),
    "NVIDIA A100 80GB PCIe": _datasheet(312, 156, 80, _A100),
    "NVIDIA L40S": _datasheet(362, 183, 48, "NVIDIA L40S datasheet"),
    "NVIDIA GeForce RTX 5090": _datasheet(209.5, 104.8, 32, "NVIDIA RTX Blackwell GPU architecture"),
    "NVIDIA GeForce RTX 4090": _datasheet(165.2, 82.6, 24, "NVIDIA Ada GPU architecture"),
}


def peak_flops(name, dtype):
    """The datasheet's FLOP/s of the device called name, in a torch.dtype; None where that is not known."""
    number_format = devices.dtype_name(dtype)
    if number_format == "float32" and torch.get_float32_matmul_precision() != "highest":
        number_format = "tf32"
    return DATASHEETS[name].peak.get(number_format) if name in DATASHEETS else None


def power_cap(device):
    """The GPU's power limit as nvidia-smi prints it ('700.00 W'); None on a CPU and where nvidia-smi fails."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def synchronise(device):
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiler(device):
    """A torch.profiler.profile that records PyTorch's operations and, on a GPU, its kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def matrix_product_flops(device, dtype, size=None, repeats=5):
    """The FLOP/s that a product of two size × size matrices of a torch.dtype reaches: the median of repeats.

    size: None: 8,192 on a GPU and 2,048 on a CPU, large enough to keep the device busy.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    products = 20 if device.type == "cuda" else 1  # timed together, so that the kernel launches do not count
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 * products / statistics.median(seconds[2:])  # the first two warm up


def attention_backend(device, dtype, config):
    """Which backend scaled_dot_product_attention chooses for a GPTConfig, with the name of its kernel on a GPU.

    Found by running one forward call with the model's shapes in the profiler.
    """
    q, k, v = (
        torch.randn(2, heads, config.block_size, config.d_k, device=device, dtype=dtype, requires_grad=True)
        for heads in (config.n_head, config.kv_heads, config.kv_heads)
    )
    options = dict(dropout_p=config.dropout, is_causal=config.causal, enable_gqa=config.kv_heads < config.n_head)
    F.scaled_dot_product_attention(q, k, v, **options)
    synchronise(device)
    with profiler(device) as profile:
        F.scaled_dot_product_attention(q, k, v, **options)
        synchronise(device)
    events = profile.key_averages()
    calls = [event.key for event in events if event.key.startswith("aten::_scaled_dot_product")]
    found = [name for part, name in ATTENTION_BACKENDS.items() if any(part in call for call in calls)]
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernel = max(on_gpu, key=lambda event: event.self_device_time_total).key if on_gpu else None
    return (found[0] if found else "unknown") + (f", kernel {kernel}" if kernel else "")


def environment(compute, config):
    """The machine and software of a measurement: name -> text, 'n/a' where unknown. compute: a devices.Compute."""
    device, dtype = compute.device, compute.dtype
    versions = runlog.versions()
    try:
        versions["transformers"] = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        versions["transformers"] = "n/a"
    name = devices.device_name(device)
    peak = peak_flops(name, dtype)
    source = f" ({DATASHEETS[name].source})" if name in DATASHEETS else ""
    return {
        "date": runlog.now(),
        "commit": runlog.git_commit() or "n/a",
        "device": name,
        "datasheet peak": f"{peak / 1e12:,.1f} TFLOP/s{source}" if peak else "n/a",
        "power cap": power_cap(device) or "n/a",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{library} {version}" for library, version in versions.items()),
        "CUDA": torch.version.cuda or "n/a",
        "dtype": devices.dtype_name(dtype),
        "compiled": "yes" if compute.compile else "no",
        "attention": attention_backend(device, dtype, config),
    }
