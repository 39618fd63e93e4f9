# What should a query be? Each kind against the baseline, over learning rates; two baselines with a wider MLP, the
# second with as many parameters as arXiv 2603.13381 compares its queries with. Logits start at what study_scale.py
# found best at n_embd 128: a standard deviation of 0.2 for a trained W_Q, of 0.6 for the input itself.
#     python sweep.py config/study_query.py config/quick.py
_trained, _input = "--attn_logit_std=0.2", "--attn_logit_std=0.6"
_baseline, _reduced = f"config/baseline_tied.py {_trained}", f"config/reduced_tied.py {_input}"
arms = {
    "baseline": _baseline,
    "baseline_mlp4p5": f"{_baseline} --mlp_ratio=4.5",
    "baseline_mlp4p75": f"{_baseline} --mlp_ratio=4.75",
    "reduced": _reduced,
    "reduced_from1": "config/reduced_tied_from1.py --attn_logit_std=0.4",
    "residual_linear": f"config/residual_linear_tied.py {_input}",
    "residual_mlp": f"config/residual_mlp_tied.py {_input}",
    "rotated": f"config/rotated_tied.py {_input}",
    "share_kv": f"{_baseline} config/share_kv.py",
    "reduced_share_kv": f"{_reduced} config/share_kv.py",
    "qk_norm": "config/baseline_tied.py config/qk_norm.py --attn_logit_std=1",
    "reduced_qk_norm": "config/reduced_tied.py config/qk_norm.py --attn_logit_std=1",
}
control = "baseline"
seeds = [1, 2, 3, 4, 5]


def grid(size):
    return [dict(learning_rate=size.learning_rate * factor) for factor in (1 / 2, 1, 2)]
