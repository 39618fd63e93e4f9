# GPT-3's second size, 350M parameters: its depth, width and learning rate (arXiv 2005.14165, Table 2.1).
#     python train.py config/gpt3_medium.py config/reduced_tied.py
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4
