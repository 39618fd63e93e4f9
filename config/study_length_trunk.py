# The runs from which study_length.py branches: each arm at a constant learning rate, kept where the decays begin.
#     python sweep.py config/study_length_trunk.py config/quick.py --out_dir=out/length_trunk
arms = {
    "baseline": "config/baseline_tied.py --attn_logit_std=0.2",
    "reduced": "config/reduced_tied.py --attn_logit_std=0.6",
}
control = "baseline"
settings = "--schedule=constant --lr_decay_iters=none --eval_interval={eval_interval}*2"
seeds = [11, 12, 13, 14, 15]


def grid(size):
    kept = [size.max_iters * factor * 4 // 5 for factor in (1, 2, 4, 8, 16)]
    return [dict(max_iters=kept[-1], save_steps=tuple(kept))]
