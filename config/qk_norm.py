# Queries and keys divided by their root mean square in each head, as today's recipes do.
#     python train.py config/quick.py config/qk_norm.py config/reduced_tied.py
qk_norm = True
