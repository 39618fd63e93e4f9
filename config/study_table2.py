# The paper's Table 2, with as many seeds as it takes to tell noise from a difference.
arms = {
    "baseline_tied": "config/baseline_tied.py",
    "reduced_tied": "config/reduced_tied.py",
    "baseline_untied": "config/baseline_untied.py",
    "reduced_untied": "config/reduced_untied.py",
}
control = {"reduced_tied": "baseline_tied", "reduced_untied": "baseline_untied"}
seeds = [1, 2, 3, 4, 5]
