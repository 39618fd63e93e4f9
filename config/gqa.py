# Grouped-query attention with two heads of keys and values, which divide the 12 heads of 124M and the 4 of quick.py.
n_kv_head = 2
