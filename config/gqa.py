# Grouped-query attention with two key-value heads, which divide the 12 heads of 124M and the 4 of quick.py.
#     python train.py config/quick.py config/gqa.py config/reduced_tied.py
n_kv_head = 2
