# Dynamic Tanh in place of LayerNorm.
norm = "dyt"
