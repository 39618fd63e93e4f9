# Values are the keys, W_V = W_K (arXiv 2606.04032): half the KV cache. With W_Q = I too, one matrix is left beside W_O.
#     python train.py config/quick.py config/share_kv.py config/reduced_tied.py
share_kv = True
