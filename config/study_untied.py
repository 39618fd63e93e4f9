# Does W_Q = I keep its lead with untied weights? Four times the size's steps, with the schedule, scales and seeds of
# study_length.py, whose tied arms at this length are the other half of Table 2.
#     python sweep.py config/study_untied.py config/quick.py
arms = {
    "baseline": "config/baseline_untied.py --attn_logit_std=0.2",
    "reduced": "config/reduced_untied.py --attn_logit_std=0.6",
}
control = "baseline"
settings = "--max_iters={max_iters}*4 --schedule=wsd --lr_decay_iters=none --decay_iters={max_iters}*4//5"
settings += " --eval_interval={eval_interval}*2"
seeds = [11, 12, 13, 14, 15]
