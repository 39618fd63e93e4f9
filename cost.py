"""What a configuration costs: parameters, operations, key/value cache, and what W_Q = I saves of them.

python cost.py config/baseline_tied.py
python cost.py config/gqa.py config/moe.py --n_layer=24
"""

import dataclasses
from dataclasses import dataclass

import configurator
from model import GPTConfig
from train_config import TrainConfig


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
    kv_width = (config.n_kv_head or config.n_head) * (d // config.n_head)
    qkv_width = d * (not config.wq_identity) + kv_width * (not config.wk_identity) + kv_width * (not config.wv_identity)
    hidden = round(config.mlp_ratio * d) * max(1, config.n_expert)
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


def compare(config: GPTConfig, name: str):
    """A table row: a configuration with W_Q, with W_Q = I, and the difference."""
    full, reduced = (cost(dataclasses.replace(config, wq_identity=identity)) for identity in (False, True))

    def change(field, divisor, unit):
        before, after = getattr(full, field), getattr(reduced, field)
        saved = f"−{1 - after / before:.1%}" if before else "none"
        return f"{before / divisor:,.1f} → {after / divisor:,.1f} {unit} ({saved})"

    cache = f"{full.kv_cache_bytes / 1024:g} KiB" if config.causal else "none"
    columns = [change("total", 1e6, "M"), change("attn_mlp", 1e6, "M"), change("training_flops", 1e6, "M")]
    return "| " + " | ".join([name, *columns, cache]) + " |"


def table(config: GPTConfig):
    """A Markdown table: the configuration itself, then kinds of attention × MLP or experts, with its other options."""
    lines = [
        "| W_Q → W_Q = I | parameters | attention + MLP | training FLOPs a token | KV cache a token |",
        "| --- | ---: | ---: | ---: | ---: |",
        compare(config, "this configuration"),
    ]
    heads = {"multi-head": config.n_head}
    heads |= {f"grouped-query, {n} heads": n for n in (4, 2) if config.n_head % n == 0 and n < config.n_head}
    heads |= {"multi-query": 1}
    experts = {"MLP": 0, "4 experts, 2 active": 4}
    plain = dataclasses.replace(config, wk_identity=False, wv_identity=False, n_expert_active=2)
    for attention, n_kv_head in heads.items():
        for mlp, n_expert in experts.items():
            variant = dataclasses.replace(plain, n_kv_head=n_kv_head, n_expert=n_expert)
            lines.append(compare(variant, f"{attention}, {mlp}"))
    return "\n".join(lines)


def main(argv):
    """The command; see the module's docstring."""
    print(table(configurator.parse(TrainConfig, argv).model_config()))


if __name__ == "__main__":
    configurator.run(main)
