# Queries X + f(X), f a bottleneck MLP with W_Q's parameters (arXiv 2603.13381; with scale ½ they are (X + f(X))/2).
# Its repository has this arm at learning rates from 8e-4 to 3.4e-3 with decays of 0.1, 0.05, 0.025, 2⁻⁵ and 2⁻⁶ (min_lr
# from 2e-5), over 60,002 steps of a cosine that ends there; the baseline at 6e-4. So set learning_rate, in all arms.
#     python train.py config/quick.py config/residual_mlp_tied.py
wq_identity = True
query_residual = "mlp"
attn_scale = 0.5
weight_decay = 2**-5
tie_weights = True
