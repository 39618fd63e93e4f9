# W_Q = I in all layers but the first, which trains its W_Q: is it the first layer that needs one?
#     python train.py config/quick.py config/reduced_tied_from1.py
wq_identity = True
wq_identity_from = 1
attn_scale = 0.5
weight_decay = 2**-5
tie_weights = True
