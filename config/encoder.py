# An encoder: every token attends to all others, and the model learns to fill in masked tokens.
#     python train.py config/quick.py config/encoder.py config/reduced_tied.py
causal = False
objective = "mlm"
