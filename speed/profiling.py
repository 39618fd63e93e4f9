"""How the time of training steps divides into kinds of operation, from a trace of torch.profiler."""

import re
import time
from pathlib import Path

import torch

from speed import hardware

# kind of operation -> pattern. A name, of an operation or a GPU kernel, in lower case, belongs to the first kind whose
# pattern it contains; so a compiled kernel that fuses several operations counts for the kind that comes first here.
KINDS = {
    "attention": r"attention|flash|fmha|sdpa",
    "optimizer": r"adam|multi_tensor|foreach|optimizer|vector_norm|clip_grad",
    "cross-entropy": r"log_?softmax|softmaxforward|softmaxbackward|nll_?loss|cross_?entropy|aten::(exp_|gather)",
    "normalisation": r"layer_?norm|rms_?norm|gammabeta|rsqrt",
    "activation": r"gelu|relu|silu|tanh|erf",
    "matrix products": r"(?<![a-z])(mm|addmm|bmm|baddbmm|matmul|linear)(?![a-z])|gemm|nvjet|cutlass",
    "copies": r"copy|memcpy|memset|(?<![a-z])(cat|to|clone|contiguous|zero_|fill_)(?![a-z])",
}


def kind_of(name):
    """The kind of the operation or kernel called name: a key of KINDS, or 'other'."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def time_shares(durations, wall=None):
    """kind -> share of the time, with sum 1, from (name, seconds) pairs of operations or kernels.

    wall: the elapsed time in seconds, for the kernels of a GPU, which run one after another: what they leave of it is
    'idle'. None: no idle time is computed, and the total is the sum of the seconds.
    """
    by_kind = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, seconds in durations:
        by_kind[kind_of(name)] += seconds
    busy = sum(by_kind.values())
    if wall is not None:
        by_kind["idle"] = max(0.0, wall - busy)
    total = sum(by_kind.values())
    return {kind: seconds / total for kind, seconds in by_kind.items()}


def profile(step, n_steps, device, path):
    """Call step() n_steps times in the profiler, after one call outside it, and write a Chrome trace to path.

    Returns kind -> share of the time: on a GPU that of the kernels, and as 'idle' the time between them, which the
    profiler itself lengthens; on a CPU that of PyTorch's operations, each without the operations that it calls.
    """
    on_cuda = device.type == "cuda"
    step()
    hardware.synchronise(device)
    with hardware.profiler(device) as trace:
        began = time.perf_counter()
        for _ in range(n_steps):
            step()
        hardware.synchronise(device)
        wall = time.perf_counter() - began
    path.unlink(missing_ok=True)
    trace.export_chrome_trace(str(path))
    if not path.exists():  # torch says nothing
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise ValueError(
            f"cannot write the trace {path}: is the disk full? Free some space, or choose another --out_dir"
        )
    device_type = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    durations = [
        (event.key, (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6)
        for event in trace.key_averages()
        # An annotated range contains kernels that are listed by themselves, too.
        if event.device_type == device_type and not getattr(event, "is_user_annotation", False)
    ]
    return time_shares(durations, wall if on_cuda else None)
