# GPT-3's third size, 760M parameters (arXiv 2005.14165, Table 2.1).
#     python train.py config/gpt3_large.py config/reduced_tied.py
n_layer = 24
n_head = 16
n_embd = 1536
learning_rate = 2.5e-4
recompute = True  # activations of a block are computed again, so that a micro-batch fits beside the optimizer
