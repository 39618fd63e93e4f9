# Arms of as many parameters. At the baseline's number: W_Q against a wider MLP. At the number of W_Q = I: a baseline
# without W_Q, with a narrower MLP, or narrower throughout (744 at n_embd 768, 124 at 128).
arms = {
    "baseline": "config/baseline_tied.py",
    "reduced_mlp4p5": "config/reduced_tied_mlp4p5.py",
    "baseline_mlp3p5": "config/baseline_tied_mlp3p5.py",
    "baseline_narrow": "config/baseline_tied.py --n_embd={n_embd}*31//32",
    "reduced": "config/reduced_tied.py",
}
control = {"reduced_mlp4p5": "baseline", "reduced": "baseline_mlp3p5", "baseline_narrow": "baseline_mlp3p5"}
seeds = [1, 2, 3]
