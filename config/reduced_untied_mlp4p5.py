# W_Q = I with W_Q's parameters spent on a wider MLP: as many parameters as the baseline.
#     python train.py config/reduced_untied_mlp4p5.py
wq_identity = True
attn_scale = 0.5
weight_decay = 2**-5
tie_weights = False
mlp_ratio = 4.5
