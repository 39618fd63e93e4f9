# Arms compared at equal numbers of parameters. At the baseline's number: W_Q = I with a wider MLP against the baseline.
# At that of W_Q = I: W_Q = I, and a baseline narrower throughout (744 at n_embd 768, 124 at 128; only about as many
# parameters), each against a baseline with a narrower MLP.
#     python sweep.py config/study_params.py config/quick.py --jobs=2
arms = {
    "baseline": "config/baseline_tied.py",
    "reduced_mlp4p5": "config/reduced_tied_mlp4p5.py",
    "baseline_mlp3p5": "config/baseline_tied_mlp3p5.py",
    "baseline_narrow": "config/baseline_tied.py --n_embd={n_embd}*31//32",
    "reduced": "config/reduced_tied.py",
}
control = {"reduced_mlp4p5": "baseline", "reduced": "baseline_mlp3p5", "baseline_narrow": "baseline_mlp3p5"}
seeds = [1, 2, 3]
