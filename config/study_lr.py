# Each arm at learning rates around the size's own, by factors of two: the fair comparison is best against best.
#     python sweep.py config/study_lr.py config/quick.py --attn_logit_std=small
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
seeds = [1, 2, 3]


def grid(size):
    return [dict(learning_rate=size.learning_rate * factor) for factor in (1 / 4, 1 / 2, 1, 2, 4)]
