# Arms with equal numbers of parameters. As many as the baseline has: W_Q = I with a wider MLP, against the baseline. As
# many as W_Q = I has: W_Q = I, and a baseline that is narrower throughout (n_embd 744 in place of 768, 124 in place of
# 128, so about as many), each against a baseline with a narrower MLP.
#     python sweep.py config/study_params.py config/quick.py --attn_logit_std=small
arms = {
    "baseline": "config/baseline_tied.py",
    "reduced_mlp4p5": "config/reduced_tied_mlp4p5.py",
    "baseline_mlp3p5": "config/baseline_tied_mlp3p5.py",
    "baseline_narrow": "config/baseline_tied.py --n_embd={n_embd}*31//32",
    "reduced": "config/reduced_tied.py",
}
control = {"reduced_mlp4p5": "baseline", "reduced": "baseline_mlp3p5", "baseline_narrow": "baseline_mlp3p5"}
seeds = [1, 2, 3, 4, 5]
