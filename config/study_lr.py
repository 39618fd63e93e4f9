# Each arm at learning rates around the size's own, by factors of two: the fair comparison is best against best.
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
grid = {
    "learning_rate": [
        "{learning_rate}/4",
        "{learning_rate}/2",
        "{learning_rate}",
        "{learning_rate}*2",
        "{learning_rate}*4",
    ]
}
seeds = [1, 2, 3]
