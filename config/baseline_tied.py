# Table 2, "Standard (tied)": trained W_Q, scale 1/√d_k, weight decay 0.1. The paper's validation loss: 2.90.
#     python train.py config/baseline_tied.py
wq_identity = False
attn_scale = 1.0
weight_decay = 0.1
tie_weights = True
