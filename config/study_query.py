# What should a query be? Each against the baseline, and against a baseline with a wider MLP (4.5 times has as many
# parameters more than the baseline as W_Q = I has fewer; with 4.75 times as many more arXiv 2603.13381 compares its
# queries), over learning rates: each arm at its own best. Logits start as large as the paper's in every arm.
#     python sweep.py config/study_query.py config/quick.py
_reduced = "config/reduced_tied.py"
arms = {
    "baseline": "config/baseline_tied.py",
    "baseline_mlp4p5": "config/baseline_tied.py --mlp_ratio=4.5",
    "baseline_mlp4p75": "config/baseline_tied.py --mlp_ratio=4.75",
    "reduced": _reduced,
    "reduced_from1": "config/reduced_tied_from1.py",
    "residual_linear": "config/residual_linear_tied.py",
    "residual_mlp": "config/residual_mlp_tied.py",
    "rotated": "config/rotated_tied.py",
    "share_kv": "config/baseline_tied.py config/share_kv.py",
    "reduced_share_kv": f"{_reduced} config/share_kv.py",
    "qk_norm": "config/baseline_tied.py config/qk_norm.py",
    "reduced_qk_norm": f"{_reduced} config/qk_norm.py",
}
control = "baseline"
settings = "--attn_logit_std=paper"
seeds = [1, 2, 3, 4, 5]


def grid(size):
    return [dict(learning_rate=size.learning_rate * factor) for factor in (1, 2, 4)]
