"""GPTs with random weights, and how far their logits are apart, for tests of rewriting that keeps the logits."""

import math

import torch

from model import GPT, GPTConfig

SMALL = dict(block_size=10, vocab_size=23, n_layer=3, n_head=4, n_embd=16, norm="none")
ATTENTION_SKIP_ONLY = dict(SMALL, mlp_skip=False)
EXACT = 1e-9  # the largest relative difference of logits if every cond(Θ) is below 1e3


def conditioned(d, cond, generator):
    """A random matrix (d, d) with singular values from 2 to 2/cond."""
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=generator).double()).Q for _ in range(2))
    return 2 * u @ torch.diag(torch.logspace(0, -math.log10(cond), d).double()) @ v


def random_model(seed=0, cond=300.0, **choice):
    """A GPT in float64 with random weights and biases; its square projections have the condition number cond."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**choice)).double().eval()
    for name, parameter in model.named_parameters():
        std = 1.0 if "wte" in name or "wpe" in name else parameter.size(-1) ** -0.5
        parameter.data = std * torch.randn(parameter.shape, generator=generator).double()
    d = model.config.n_embd
    for block in model.transformer.h:
        weight = block.attn.c_attn.weight.data
        for row in range(0, len(weight) - d + 1, d):
            weight[row : row + d] = conditioned(d, cond, generator)
    return model


def logits(model, seed=0):
    idx = torch.randint(model.config.vocab_size, (2, model.config.block_size), generator=torch.manual_seed(seed))
    with torch.no_grad():
        return model(idx, idx)[0]


def difference(model, other):
    """The largest difference between the logits of two models, divided by the largest logit of the first."""
    expected = logits(model)
    assert expected.std() > 0
    return ((logits(other) - expected).abs().max() / expected.abs().max()).item()


def attention(x, w_q, w_k, w_v, n_head, scale=0.5):
    """The paper's S_c in its notation: causal heads concatenated, (T, d); keys and values may have fewer heads."""
    q, k, v = (x @ w for w in (w_q, w_k, w_v))
    d_k, heads = q.size(1) // n_head, []
    for head in range(n_head):
        shared = head * (k.size(1) // d_k) // n_head
        q_i, k_i, v_i = (t[:, i * d_k : (i + 1) * d_k] for t, i in ((q, head), (k, shared), (v, shared)))
        mask = torch.full((len(x), len(x)), -math.inf).double().triu(1)
        heads.append((scale * q_i @ k_i.T + mask).softmax(-1) @ v_i)
    return torch.cat(heads, dim=1)


def normal(*shape, seed=0):
    """Standard Gaussian numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
