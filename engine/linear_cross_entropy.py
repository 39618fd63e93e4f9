"""The cross-entropy of a linear layer's logits with a part of them in memory at a time.

At a vocabulary of 50,304 the logits of 4,096 tokens and their gradient are several tensors of 0.8 GB in float32, and
on a CPU most of the time that the loss takes goes into moving them.
"""

import torch

CHUNK = 2**26  # logits that a matrix product writes at most, into a buffer that is used again
PART = 2**19  # logits in float32 at once on a CPU, few enough for a core's cache


def linear_cross_entropy(x, weight, targets, reduction="mean"):
    """F.cross_entropy(F.linear(x, weight), targets), in nats, up to rounding.

    x: (N, n_embd). weight: (vocab_size, n_embd). targets: (N,) int64; −1 is ignored, its loss is 0.
    Returns the mean over the targets that count; with reduction='none', which has no gradient, each loss, (N,) float32.
    Products are in autocast's precision where it is on; the gradient of the weight is summed in float32.
    """
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if needs_gradient:
        assert reduction == "mean", f"reduction={reduction!r} has no gradient"
        return _MeanLoss.apply(x, weight, targets)
    losses, _, _ = losses_and_gradients(x, weight, targets, gradients=False)
    return losses if reduction == "none" else losses.sum() / (targets != -1).sum()


class _MeanLoss(torch.autograd.Function):
    """The mean loss. Both gradients are made on the way forward, while a chunk's probabilities are at hand."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        losses, grad_x, grad_weight = losses_and_gradients(x, weight, targets, gradients=True)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum() / (targets != -1).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        # In grad_loss's precision: in bfloat16 the factor itself would be rounded, and all of the gradient with it.
        grad_x = (grad_x.to(grad_loss.dtype) * grad_loss).to(grad_x.dtype)
        return grad_x, (grad_weight * grad_loss).to(ctx.weight_dtype), None


def losses_and_gradients(x, weight, targets, gradients):
    """Each target's loss, (N,), and with gradients those of their mean, of x in x's dtype and of the weight."""
    matrix = weight.to(x.dtype)
    n_rows, vocab_size = len(x), len(weight)
    losses = torch.empty(n_rows, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    counts = (targets != -1)[:, None].to(losses.dtype)
    shares = counts / counts.sum().clamp(min=1)  # of a target in the mean
    places = targets.masked_fill(targets == -1, 0)[:, None]
    grad_x = torch.empty_like(x) if gradients else None
    grad_weight = torch.zeros_like(weight, dtype=losses.dtype) if gradients else None
    chunk = min(n_rows, max(1, CHUNK // vocab_size))
    part = max(1, PART // vocab_size) if x.device.type == "cpu" else chunk
    buffer = x.new_empty(chunk, vocab_size)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        logits = torch.mm(x[rows], matrix.T, out=buffer[: rows.stop - rows.start])
        for first in range(start, rows.stop, part):
            some = slice(first, min(first + part, rows.stop))
            few = logits[some.start - start : some.stop - start]
            log_p = few.to(losses.dtype).log_softmax(dim=-1)
            losses[some] = -(log_p.gather(1, places[some]) * counts[some])[:, 0]
            if gradients:  # of a loss by its logits: the probabilities, less 1 at the target
                p = log_p.exp_()
                p[torch.arange(len(p), device=p.device), places[some][:, 0]] -= 1
                few.copy_(p.mul_(shares[some]))
        if gradients:
            torch.mm(logits, matrix, out=grad_x[rows])
            grad_weight += logits.T @ x[rows]
    return losses, grad_x, grad_weight
