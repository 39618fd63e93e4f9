# The paper's two arms differ in weight decay and attention scale as well as in W_Q. Here each has every combination of
# both, at any size. Weights shrink to exp(−d) by decay alone, where d is the decay times the sum of the learning rates:
# 6.1 and 1.9 for the paper's arms, but 0.07 and 0.02 in the 400 steps of quick.py, where decays as small do nothing. So
# the decays here are those that give the size's runs the d which 0, 2⁻⁶, 2⁻⁵, 2⁻⁴ and 0.1 give the paper's.
#     python sweep.py config/study_wd_scale.py config/quick.py
from train_config import TrainConfig as _TrainConfig

arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
seeds = [1, 2, 3]


def grid(size):
    factor = _TrainConfig().learning_rate_sum() / _TrainConfig(**vars(size)).learning_rate_sum()
    decays = [float(f"{decay * factor:.5g}") for decay in (0, 2**-6, 2**-5, 2**-4, 0.1)]
    return {"weight_decay": decays, "attn_scale": [0.25, 0.5, 1, 2]}
