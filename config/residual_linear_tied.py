# Queries X + X·W_Q (the authors' `residual`): as many parameters as the baseline. Their values, with decay 0.1.
#     python train.py config/quick.py config/residual_linear_tied.py
wq_identity = True
query_residual = "linear"
attn_scale = 0.5
weight_decay = 0.1
tie_weights = True
