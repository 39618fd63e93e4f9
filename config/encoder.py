# An encoder: every token sees all others, and learns to fill in masked ones.
causal = False
objective = "mlm"
