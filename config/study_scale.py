# Each arm at attention scales around the paper's two (1 for the baseline, 1/2 for W_Q = I), by factors of two.
#     python sweep.py config/study_scale.py config/quick.py
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
grid = {"attn_scale": [0.25, 0.5, 1, 2, 4]}
seeds = [1, 2, 3]
