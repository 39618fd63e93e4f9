"""A mixture's active experts alone, in one product for all of them."""

import torch
from torch.nn import functional as F


def can_group(config):
    """Whether `active_experts` can compute the mixture of this GPTConfig: with grouped products, of aligned rows."""
    aligned = config.n_embd % 8 == config.mlp_hidden % 8 == 0  # 16 bytes in bfloat16
    return hasattr(F, "grouped_mm") and aligned and not config.bias


def is_fast(x):
    """Whether the device of a tensor has one kernel for grouped products in its dtype: bfloat16, on some GPUs.

    These are of compute capability 9 and 10; others multiply in a loop that waits for each expert's number of rows. So
    does a CPU, where these numbers, as chance has them, also leave the freed memory in pieces that no later tensor
    fits: a step took nearly twice as long as with all experts, and the process 2.4 GB in place of 0.7.
    """
    return x.dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def active_experts(x, weight, expert, c_fc, activation, c_proj):
    """The sum over each token's experts of weight · c_proj(activation(c_fc(x))), in bfloat16.

    x: (B, T, n_embd); weight and expert: (B, T, n_active), the number of each expert; c_fc: (n_expert, n_embd, hidden);
    c_proj: (n_expert, hidden, n_embd). Returns (B, T, n_embd). Each pair of a token and one of its experts is a row;
    rows are sorted by expert.
    """
    n_active, n_expert = expert.size(-1), len(c_fc)
    experts, order = expert.flatten().sort(stable=True)  # (pairs,)
    ends = torch.searchsorted(experts, torch.arange(n_expert, device=x.device), right=True).int()
    # Both ways each row is taken once: index_select(0, order // n_active) would sum gradients in an order of chance.
    pairs = x.bfloat16().unsqueeze(2).expand(-1, -1, n_active, -1).flatten(0, 2)  # (pairs, n_embd)
    hidden = activation(F.grouped_mm(pairs.index_select(0, order), c_fc.bfloat16(), offs=ends))
    out = F.grouped_mm(hidden, c_proj.bfloat16(), offs=ends)
    out = out.index_select(0, order.argsort()).unflatten(0, expert.shape)  # (B, T, n_active, n_embd)
    return (out * weight.unsqueeze(-1).type_as(out)).sum(dim=2)
