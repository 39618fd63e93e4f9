# Multi-query attention: one head of keys and values for all heads of queries.
n_kv_head = 1
