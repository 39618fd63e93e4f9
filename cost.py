"""Print what a configuration costs (parameters, FLOPs, KV cache) with W_Q and with W_Q = I.

python cost.py config/baseline_tied.py
python cost.py config/gqa.py config/moe.py --n_layer=24

The first row is the configuration itself; the second is an encoder of its shape without the LM head, whose vocabulary ×
n_embd matrix makes W_Q a smaller share of the rest. The others change its attention (multi-head, grouped-query,
multi-query) and its MLP (one MLP, or a mixture of experts). FLOPs are counted as in `engine/flops.py`, the cache in
bfloat16.
"""

import dataclasses

import configurator
from engine.flops import Cost, cost
from model import GPTConfig
from studies import page
from train_config import TrainConfig

PLAIN_QUERY = dict(query_residual=None, query_rotation=False, wq_identity_from=0)
COLUMNS = ["W_Q → W_Q = I", "parameters", "attention + MLP", "training FLOPs per token", "KV cache per token"]


def without_head(config: GPTConfig, counted: Cost) -> Cost:
    """The cost without an LM head, neither its matrix, if untied, nor its product."""
    head = config.vocab_size * config.n_embd
    total = counted.total if config.tie_weights else counted.total - head
    forward = counted.forward_flops - 2 * head
    return dataclasses.replace(counted, total=total, forward_flops=forward, training_flops=3 * forward)


def cost_row(config: GPTConfig, name: str, has_head=True) -> list[str]:
    """The cells of COLUMNS for one configuration: each cost with W_Q, with W_Q = I, and the share saved."""
    pair = [dataclasses.replace(config, **PLAIN_QUERY, wq_identity=identity) for identity in (False, True)]
    baseline, reduced = (cost(each) if has_head else without_head(each, cost(each)) for each in pair)

    def change(field):
        before, after = getattr(baseline, field), getattr(reduced, field)
        saved = f"−{1 - after / before:.1%}" if before else "none"
        return f"{before / 1e6:,.1f} → {after / 1e6:,.1f} M ({saved})"

    cache = f"{baseline.kv_cache_bytes / 1024:g} KiB" if config.causal else "none"
    return [name, change("total"), change("attn_mlp"), change("training_flops"), cache]


def cost_table(config: GPTConfig) -> page.Table:
    """The costs of a configuration, and of the same with each kind of attention × MLP or mixture of experts."""
    encoder = dataclasses.replace(config, causal=False)
    rows = [cost_row(config, "this configuration"), cost_row(encoder, "an encoder without an LM head", has_head=False)]
    heads = {"multi-head": config.n_head}
    heads |= {f"grouped-query, {n} heads": n for n in (4, 2) if config.n_head % n == 0 and n < config.n_head}
    heads |= {"multi-query": 1}
    experts = {"MLP": 0, "4 experts, 2 active": 4}
    plain = dataclasses.replace(config, wk_identity=False, wv_identity=False, n_expert_active=2)
    for attention, n_kv_head in heads.items():
        for mlp, n_expert in experts.items():
            variant = dataclasses.replace(plain, n_kv_head=n_kv_head, n_expert=n_expert)
            rows.append(cost_row(variant, f"{attention}, {mlp}"))
    return page.Table(COLUMNS, rows, words=COLUMNS[:1])


def main(argv):
    """The command; see the module's docstring."""
    cfg = TrainConfig(**configurator.read(TrainConfig, argv, usage=__doc__))
    print(cost_table(cfg.model_config()).markdown())


if __name__ == "__main__":
    configurator.run(main)
