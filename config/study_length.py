# Does the difference close with training? From the size's own steps to sixteen times as many. Each length is warm-up,
# stable, decay: study_length_trunk.py trains each arm once at a constant learning rate, and each length branches from
# there for a decay in its last fifth. The question, fixed beforehand, is the difference at the longest. The seeds were
# in no study before, and logits start at what study_scale.py found best at n_embd 128: 0.2, and between 0.4 and 0.8.
#     python sweep.py config/study_length_trunk.py config/quick.py --out_dir=out/length_trunk
#     python sweep.py config/study_length.py config/quick.py
arms = {
    "baseline": "config/baseline_tied.py --attn_logit_std=0.2",
    "reduced": "config/reduced_tied.py --attn_logit_std=0.6",
}
control = "baseline"
settings = "--schedule=wsd --lr_decay_iters=none --eval_interval={eval_interval}*2"
seeds = [11, 12, 13, 14, 15]
equal_within = 0.005


def grid(size):
    lengths = [size.max_iters * factor for factor in (1, 2, 4, 8, 16)]
    trunk = "out/length_trunk/{arm},max_iters=" + str(lengths[-1] * 4 // 5) + "/seed{seed}"
    return [
        dict(max_iters=steps, decay_iters=steps // 5, branch_from=f"{trunk}/step_{steps * 4 // 5:06d}.pt")
        for steps in lengths
    ]
