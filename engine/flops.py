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
    deducted, as in the usual 6N + 12·L·d·T), and of a mixture's active experts, though all are computed where
    grouped products are not fast (`experts.is_fast`).
    """
    d, biases = config.n_embd, int(config.bias)
    kv_width = config.kv_heads * config.d_k
    kv_blocks = 2 - config.wk_identity - config.wv_identity - config.share_kv
    n_mlp, n_active = (config.n_expert, config.n_expert_active) if config.n_expert else (1, 1)
    mlp, router = d * (config.fc_width + config.mlp_hidden), d * config.n_expert
    matrices = d * kv_blocks * kv_width + d * d + router  # of one layer, without queries and MLP
    layer = matrices + n_mlp * mlp + biases * (kv_blocks * kv_width + d + n_mlp * config.fc_width + d)
    norm = {"layernorm": d * (1 + biases), "rmsnorm": d, "dyt": 2 * d + 1, "none": 0}[config.norm]
    blocks = 1 if config.share_layers else config.n_layer
    w_q, bottleneck = d * d, 2 * d * (d // 2)
    query = {  # of each kind of queries: its parameters, and those of its products
        "trained": (w_q + biases * d, w_q),
        "identity": (0, 0),
        "linear": (w_q + biases * d, w_q),
        "mlp": (bottleneck + 2 * d + biases * (2 * d + d // 2), bottleneck),
        "rotation": (0, w_q),
    }
    queries = [query[config.query(layer_number)] for layer_number in range(config.n_layer)]
    attn_mlp = blocks * layer + sum(parameters for parameters, _ in queries[:blocks])
    embeddings = config.vocab_size * d * (1 if config.tie_weights else 2) + config.block_size * d * (
        config.pos == "learned"
    )
    norms = norm * ((1 if config.parallel else 2) * blocks + 1)
    attention = 4 * config.block_size * d  # QKᵀ and the weighted sum of V
    products = config.n_layer * (matrices + n_active * mlp) + sum(product for _, product in queries)
    forward = 2 * products + config.n_layer * attention + 2 * d * config.vocab_size
    cache = 2 * config.n_layer * (1 if config.values_are_keys else 2) * kv_width if config.causal else 0
    return Cost(attn_mlp + embeddings + norms, attn_mlp, forward, 3 * forward, cache)
