# Section 5.1 at h = 64 in about three minutes on one CPU core: half of the paper's steps, a batch 64 times smaller.
#     python -m theory.basis_transfer config/basis_transfer_quick.py
h = (64,)
seeds = (0, 1, 2)
steps = 10_000
batch = 1024
out_dir = "results/basis_transfer_quick"
