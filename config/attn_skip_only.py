# The architecture of Theorem 4.1: no normalisation, and a skip connection around attention only.
norm = "none"
mlp_skip = False
