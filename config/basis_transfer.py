# Section 5.1 as the paper has it, but with three random targets for each dimension in place of one. For a CUDA GPU.
#     python -m theory.basis_transfer config/basis_transfer.py
targets = ("paper",)
h = (256, 512, 768)
seeds = (0, 1, 2)
steps = 20_000
batch = 65_536
