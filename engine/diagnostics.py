"""What attention does inside a trained model, layer by layer: sizes of logits, entropy, norms and gradients.

`train.py --diagnostics` records it at each evaluation; it explains what attn_scale and weight_decay do.
"""

import math

import torch


def of_attention(attn, x):
    """Numbers about one SelfAttention on its input x, (B, T, n_embd), as a dict of floats.

    attn_logit_max, attn_logit_mean: the largest and the mean absolute logit, scaled, among the pairs that attention
    sees. attn_logit_std: the standard deviation over the keys of a query, averaged over queries: what softmax feels.
    attn_entropy: of a query's weights, in nats, averaged. query_norm, key_norm: mean L2 norm of a head's vector.
    """
    q, k, _ = (t.float() for t in attn.project(x))  # (B, heads, T, d_k)
    group = q.size(1) // k.size(1)
    with torch.autocast(x.device.type, enabled=False):  # float32, in whatever precision the model runs
        logits = q @ k.repeat_interleave(group, dim=1).mT * attn.scale  # (B, n_head, T, T)
    seen = torch.ones_like(logits[0, 0], dtype=torch.bool)
    if attn.is_causal:
        seen = seen.tril()
    n_keys = seen.sum(dim=-1)  # of each query
    visible = logits.masked_fill(~seen, 0.0)
    mean = visible.sum(dim=-1, keepdim=True) / n_keys[:, None]
    variance = ((visible - mean).square() * seen).sum(dim=-1) / n_keys
    log_p = logits.masked_fill(~seen, -torch.inf).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~seen, 0.0)).sum(dim=-1)
    return {
        "attn_logit_max": visible.abs().max().item(),
        "attn_logit_mean": (visible.abs().sum() / (n_keys.sum() * len(logits) * logits.size(1))).item(),
        "attn_logit_std": variance.sqrt().mean().item(),
        "attn_entropy": entropy.mean().item(),
        "query_norm": q.norm(dim=-1).mean().item(),
        "key_norm": k.norm(dim=-1).mean().item(),
    }


def of_weights(attn, gradients):
    """Frobenius norms of a SelfAttention's W_Q and W_K (None for an identity), and of all its gradients together."""
    w_q, w_k, _ = (part.norm().item() if len(part) else None for part in attn.split_qkv(attn.c_attn.weight, dim=0))
    squares = sum(gradient.float().square().sum().item() for gradient in gradients)
    return {"W_Q_norm": w_q, "W_K_norm": w_k, "grad_norm": math.sqrt(squares)}


def measure(model, x, y, autocast):
    """`of_attention` and `of_weights` of each layer of a GPT on inputs x and targets y, (n, T) int64: {name: [floats]}.

    Lists have an entry per layer, in the order in which layers run. Gradients are those of the loss on x and y. The
    model's mode, its own gradients and the random state stay as they are.
    """
    rows = []
    attentions = [block.attn for block in model.transformer.h]

    def look(attn, inputs, _):
        with torch.no_grad():
            each = [of_attention(attn, sequence[None]) for sequence in inputs[0]]  # one at a time: T² logits each
        worst = max(numbers["attn_logit_max"] for numbers in each)
        rows.append({name: sum(numbers[name] for numbers in each) / len(each) for name in each[0]})
        rows[-1]["attn_logit_max"] = worst

    handles = [attn.register_forward_hook(look) for attn in attentions]
    training = model.training
    model.eval()  # no dropout, so nothing is drawn
    try:
        with autocast:
            _, loss = model(x, y)
        for handle in handles:  # before recomputed blocks would call them again
            handle.remove()
        # Not backward(), which would also fill the parameters' gradients and wake DistributedDataParallel.
        parameters = [list(attn.parameters()) for attn in attentions]
        gradients = iter(torch.autograd.grad(loss, [p for own in parameters for p in own]))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    weights = [
        of_weights(attn, [next(gradients) for _ in own]) for attn, own in zip(attentions, parameters, strict=True)
    ]
    rows = [row | weights[block] for row, block in zip(rows, model.order, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}
