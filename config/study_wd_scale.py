# The paper's two arms differ in weight decay and attention scale as well as in W_Q. Here each has every
# combination of both.
#     python sweep.py config/study_wd_scale.py config/quick.py
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
grid = {"weight_decay": [0, 2**-6, 2**-5, 2**-4, 0.1], "attn_scale": [0.25, 0.5, 1, 2]}
seeds = [1, 2, 3]
