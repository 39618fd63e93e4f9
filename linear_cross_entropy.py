"""The cross-entropy of a linear layer's logits without all of them in memory: some rows at a time.

At a vocabulary of 50,304 the logits of 4,096 tokens and their gradient are several tensors of 0.8 GB in float32, and
on a CPU most of the time that the loss takes goes into moving them.
"""

import torch

CHUNK = 2**26  # logits that a matrix product writes at once; their buffer is used again
PART = 2**19  # logits in float32 at once on a CPU, few enough for a core's cache


def linear_cross_entropy(x, weight, targets, reduction="mean"):
    """F.cross_entropy(F.linear(x, weight), targets), in nats, up to rounding.

    x: (N, n_embd). weight: (vocab_size, n_embd). targets: (N,) int64; −1 is ignored, its loss is 0.
    Returns the mean over the targets that count; with reduction='none', which has no gradient, each loss, (N,) float32.
    Products are in autocast's precision where it is on; the gradient of the weight is summed in float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if reduction == "mean":
        return _MeanLoss.apply(x.to(dtype), weight, targets)
    with torch.no_grad():
        losses, _, _ = losses_and_gradients(x.to(dtype), weight, targets, gradients=False)
    return losses


class _MeanLoss(torch.autograd.Function):
    """The mean loss. Both gradients are made on the way forward, while a chunk's probabilities are at hand."""

    @staticmethod
    @torch.compiler.disable  # one graph would hold every chunk
    def forward(ctx, x, weight, targets):
        losses, grad_x, grad_weight = losses_and_gradients(x, weight, targets, gradients=True)
        count = (targets >= 0).sum()
        ctx.save_for_backward(grad_x, grad_weight, count)
        return losses.sum() / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_weight, count = ctx.saved_tensors
        factor = grad_loss / count
        return grad_x * factor.to(grad_x.dtype), grad_weight * factor, None


def losses_and_gradients(x, weight, targets, gradients):
    """Each target's loss, (N,), and with gradients those of the sum of losses, of x in x's dtype and of the weight."""
    matrix = weight.to(x.dtype)
    n_rows, vocab_size = len(x), len(weight)
    losses = torch.empty(n_rows, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_x, grad_weight = (torch.empty_like(x), torch.zeros_like(weight)) if gradients else (None, None)
    chunk = min(n_rows, max(1, CHUNK // vocab_size))
    part = max(1, PART // vocab_size) if x.device.type == "cpu" else chunk
    buffer = x.new_empty(chunk, vocab_size)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        logits = torch.mm(x[rows], matrix.T, out=buffer[: rows.stop - rows.start])
        for few, loss, target in zip(
            logits.split(part), losses[rows].split(part), targets[rows].split(part), strict=True
        ):
            log_p = few.to(losses.dtype).log_softmax(dim=-1)
            place, counts = target.clamp(min=0)[:, None], (target >= 0)[:, None]
            loss.copy_(-(log_p.gather(1, place) * counts)[:, 0])
            if gradients:  # of a loss by its logits: the probabilities, less 1 at the target
                p = log_p.exp_()
                p.scatter_add_(1, place, p.new_full((), -1.0).expand_as(place))
                few.copy_(p.mul_(counts))
        if gradients:
            torch.mm(logits, matrix, out=grad_x[rows])
            grad_weight += logits.T @ x[rows]
    return losses, grad_x, grad_weight
