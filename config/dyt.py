# Dynamic Tanh in place of LayerNorm.
#     python train.py config/quick.py config/dyt.py config/reduced_tied.py
norm = "dyt"
