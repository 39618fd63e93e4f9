# How large should attention logits be at the start? Each arm over their standard deviation, by factors of two. Two
# rules agree at the paper's width only: as large as the baseline's own with scale 1 (0.02²·d: 0.31 at 768, 0.05 at
# 128), or as large as the paper's, 0.28 for W_Q = I and 0.31 for the baseline, at every width.
#     python sweep.py config/study_scale.py config/quick.py
#     python sweep.py config/study_scale.py config/quick.py --n_embd=64 --out_dir=out/study_scale_64
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
grid = {"attn_logit_std": [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]}
seeds = [1, 2, 3]
