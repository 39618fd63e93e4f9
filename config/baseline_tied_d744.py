# The baseline made narrower throughout (12 heads of 62): about as many parameters as W_Q = I has at n_embd 768.
#     python train.py config/baseline_tied_d744.py
wq_identity = False
attn_scale = 1.0
weight_decay = 0.1
tie_weights = True
n_embd = 744
