"""What a configuration costs: parameters, operations, key/value cache, and what W_Q = I saves of them.

python cost.py config/baseline_tied.py
python cost.py config/gqa.py config/moe.py --n_layer=24
"""

import dataclasses

import configurator
from engine.flops import cost
from model import GPTConfig
from train_config import TrainConfig


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
