# Does warm-up, stable, decay end where a cosine of the same length does? The cosine to a tenth of the peak, as in the
# paper, against one to zero, and against a constant rate that falls to zero in the last fifth or two fifths of the run;
# each at learning rates around the size's own, since the mean rate of the four is not the same.
#     python sweep.py config/study_schedule.py config/quick.py
arms = {
    "cosine": "config/baseline_tied.py --lr_decay_iters=none",
    "cosine_to_0": "config/baseline_tied.py --lr_decay_iters=none --min_lr=0",
    "wsd_fifth": "config/baseline_tied.py --schedule=wsd --decay_iters={max_iters}//5",
    "wsd_two_fifths": "config/baseline_tied.py --schedule=wsd --decay_iters={max_iters}*2//5",
}
control = "cosine"
seeds = [1, 2, 3]


def grid(size):
    return [dict(learning_rate=size.learning_rate * factor) for factor in (1 / 2, 1, 2, 4)]
