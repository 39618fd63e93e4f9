# The baseline with a narrower MLP: as many parameters as W_Q = I, which has no query matrix.
#     python train.py config/baseline_tied_mlp3p5.py
wq_identity = False
attn_scale = 1.0
weight_decay = 0.1
tie_weights = True
mlp_ratio = 3.5
