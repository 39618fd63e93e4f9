# Does the difference close with training? From a quarter of the size's steps to four times as many, each length with a
# schedule of its own: warm-up in proportion, and a cosine that ends with the run.
#     python sweep.py config/study_length.py config/quick.py
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
settings = "--lr_decay_iters=none"
seeds = [1, 2, 3]


def grid(size):
    return [
        dict(max_iters=size.max_iters // 4, warmup_iters=size.warmup_iters // 4),
        dict(max_iters=size.max_iters // 2, warmup_iters=size.warmup_iters // 2),
        dict(max_iters=size.max_iters, warmup_iters=size.warmup_iters),
        dict(max_iters=size.max_iters * 2, warmup_iters=size.warmup_iters * 2),
        dict(max_iters=size.max_iters * 4, warmup_iters=size.warmup_iters * 4),
    ]
