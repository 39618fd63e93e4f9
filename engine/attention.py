"""Which kernel computes attention."""

import contextlib

import torch
from torch.nn import functional as F


def attend(q, k, v, **options):
    """F.scaled_dot_product_attention of (B, heads, T, d_k) each; with gradients, on a CPU and at small T in float32.

    There its backward pass takes up to five times as long in bfloat16, more than the forward pass saves.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.size(2) * q.size(3) <= 2**14:
        in_float32 = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*in_float32, **options).type_as(v)
    return F.scaled_dot_product_attention(q, k, v, **options)


def prefer_attention(device):
    """A context in which scaled_dot_product_attention on CUDA takes cuDNN's kernel where that can be, then flash.

    torch's own order differs between GPUs. On an H100 cuDNN's is reported to be twice as fast as FlashAttention-2.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)
