"""What a configuration costs, counted without building the model."""

from dataclasses import dataclass

from model import GPTConfig


@dataclass(frozen=True)
class Cost:
    """The cost of a model, from its configuration alone."""

    total: int  # parameters, a tied or shared matrix once
    attn_mlp: int  # parameters of the attention and MLP layers
    forward_flops: int  # operations for one token in a full context, a multiplication and an addition each
    training_flops: int  # forward and backward: three times forward_flops
    kv_cache_bytes: int  # of one token of context, in bfloat16; 0 for an encoder, which keeps no cache


def cost(config: GPTConfig) -> Cost:
    """Count without building the model.

    Operations are those of the matrix products and of attention over all block_size positions (the causal half is not
    deducted, as in the usual 6N + 12·L·d·T); a mixture of experts computes all of its experts.
    """
    d, biases = config.n_embd, int(config.bias)
    kv_width = config.kv_heads * config.d_k
    qkv_width = d * (not config.wq_identity) + kv_width * (not config.wk_identity) + kv_width * (not config.wv_identity)
    hidden = config.mlp_hidden * max(1, config.n_expert)
    matrices = d * qkv_width + d * d + 2 * d * hidden + d * config.n_expert  # of one layer
    layer = matrices + biases * (qkv_width + d + hidden + d)
    norm = {"layernorm": d * (1 + biases), "rmsnorm": d, "dyt": 2 * d + 1, "none": 0}[config.norm]
    blocks = 1 if config.share_layers else config.n_layer
    embeddings = config.vocab_size * d * (1 if config.tie_weights else 2) + config.block_size * d * (
        config.pos == "learned"
    )
    norms = norm * ((1 if config.parallel else 2) * blocks + 1)
    attention = 4 * config.block_size * d  # QKᵀ and the weighted sum of V
    forward = config.n_layer * (2 * matrices + attention) + 2 * d * config.vocab_size
    cache = 2 * config.n_layer * 2 * kv_width if config.causal else 0
    return Cost(blocks * layer + embeddings + norms, blocks * layer, forward, 3 * forward, cache)
