# Section 5.1 as the paper has it; three targets for each dimension instead of one. For a CUDA GPU.
targets = ("paper",)
h = (256, 512, 768)
seeds = (0, 1, 2)
steps = 20_000
batch = 65_536
