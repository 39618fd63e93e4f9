# Multi-query attention: one key-value head for all query heads.
#     python train.py config/quick.py config/mqa.py config/reduced_tied.py
n_kv_head = 1
