"""Where the time of training steps goes, by kind of operation, from a trace of torch.profiler."""

import re
import time

import torch

from speed import hardware

# The first kind whose pattern the name of an operation or of a GPU kernel contains, in lower case. A compiled kernel
# that fuses several is of the kind that is named first here.
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


def shares(seconds, wall=None):
    """kind -> share of the time, all together 1, from (name, seconds) pairs.

    wall: seconds that passed on the clock, where what runs one after the other (kernels of a GPU) is measured: the
    rest is 'idle'. None: there is no idle time, all is the sum of the seconds.
    """
    by_kind = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, duration in seconds:
        by_kind[kind_of(name)] += duration
    busy = sum(by_kind.values())
    if wall is not None:
        by_kind["idle"] = max(0.0, wall - busy)
    total = sum(by_kind.values())
    return {kind: duration / total for kind, duration in by_kind.items()}


def profile(step, steps, device, path):
    """Run step() `steps` times in the profiler, after one time without, and write a Chrome trace to path.

    Returns kind -> share of the time. On a GPU that is the time of its kernels, and idle is what lies between them,
    which the profiler makes longer; on a CPU it is the time of PyTorch's operations, each without those that it calls.
    """
    on_cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    hardware.synchronise(device)
    with torch.profiler.profile(activities=activities) as trace:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        hardware.synchronise(device)
        wall = time.perf_counter() - began
    trace.export_chrome_trace(str(path))
    wanted = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    seconds = [
        (event.key, (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6)
        for event in trace.key_averages()
        # What code marks as a range of its own would count its kernels a second time.
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    return shares(seconds, wall if on_cuda else None)
