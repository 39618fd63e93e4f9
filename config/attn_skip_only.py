# The architecture of Theorem 4.1: no normalisation, and a skip connection around attention only.
#     python train.py config/quick.py config/attn_skip_only.py config/baseline_tied.py
norm = "none"
mlp_skip = False
