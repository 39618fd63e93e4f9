# GPT-3's fourth size, 1.3B parameters (arXiv 2005.14165, Table 2.1, but with 16 heads of 128, which make up n_embd).
#     torchrun --nproc_per_node=8 train.py config/gpt3_xl.py config/reduced_tied.py --shard=full
n_layer = 24
n_head = 16
n_embd = 2048
learning_rate = 2e-4
recompute = True  # activations of a block are computed again, so that a micro-batch fits beside the optimizer
