"""Which kernel computes attention."""

import contextlib
import math

import torch
from torch.nn import functional as F

LONGEST = 512  # tokens; above, the kernel's skipped half of the logits outweighs its slow backward pass on a CPU


def attend(q, k, v, **options):
    """F.scaled_dot_product_attention of (B, heads, T, d_k) each; to train on short sequences on a CPU, products.

    There the kernel's backward pass takes several times as long in 16 bits as in float32.
    """
    in_half = v.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16)
    if in_half and torch.is_grad_enabled() and q.size(2) == k.size(2) <= LONGEST and "attn_mask" not in options:
        with torch.autocast("cpu", enabled=False):
            return attend_by_products(q.to(v.dtype), k.to(v.dtype), v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def attend_by_products(q, k, v, *, scale, is_causal=False, enable_gqa=False, dropout_p=0.0):
    """The same as two products and a softmax between them, all logits at once: (B, heads, T, T), in v's dtype."""
    B, n_head, T, _ = q.shape
    if enable_gqa:
        k, v = (t.repeat_interleave(n_head // t.size(1), dim=1) for t in (k, v))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B · heads, T, d_k)
    hidden = q.new_full((T, T) if is_causal else (1, 1), -math.inf if is_causal else 0.0).triu(1)
    logits = torch.baddbmm(hidden, q, k.mT, alpha=scale)  # (B · heads, T, T)
    weights = F.dropout(logits.softmax(-1), dropout_p)
    return (weights @ v).unflatten(0, (B, n_head))


def prefer_attention(device):
    """A context in which scaled_dot_product_attention on CUDA takes cuDNN's kernel where that can be, then flash.

    torch's own order differs between GPUs. On an H100 cuDNN's is reported to be twice as fast as FlashAttention-2.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)
