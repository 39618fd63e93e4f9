# Table 2, "Standard (untied)": trained W_Q, scale 1/√d_k, weight decay 0.1. The paper's validation loss: 2.87.
#     python train.py config/baseline_untied.py
wq_identity = False
attn_scale = 1.0
weight_decay = 0.1
tie_weights = False
