# Queries X·R, R a fixed random rotation in each layer: does it matter that the heads of all layers read one basis?
#     python train.py config/quick.py config/rotated_tied.py
wq_identity = True
query_rotation = True
attn_scale = 0.5
weight_decay = 2**-5
tie_weights = True
