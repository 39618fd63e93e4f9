# Does the difference close with training? From a quarter of the size's steps to four times as many, each length with a
# schedule of its own: warm-up in proportion, and a cosine that ends with the run.
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
settings = "--lr_decay_iters=none"
grid = {
    "max_iters": {
        "{max_iters}//4": "--warmup_iters={warmup_iters}//4",
        "{max_iters}//2": "--warmup_iters={warmup_iters}//2",
        "{max_iters}": "--warmup_iters={warmup_iters}",
        "{max_iters}*2": "--warmup_iters={warmup_iters}*2",
        "{max_iters}*4": "--warmup_iters={warmup_iters}*4",
    }
}
seeds = [1, 2, 3]
