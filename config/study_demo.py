# The baseline and W_Q = I, once each and side by side: make demo.
#     python sweep.py config/study_demo.py config/quick.py --out_dir=out/demo
arms = {"baseline_tied": "config/baseline_tied.py", "reduced_tied": "config/reduced_tied.py"}
control = "baseline_tied"
settings = "--attn_logit_std=small"
seeds = [1337]
