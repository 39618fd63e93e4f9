# The paper's Table 2, with five seeds to tell a difference from noise.
#     python sweep.py config/study_table2.py config/quick.py --attn_logit_std=small
arms = {
    "baseline_tied": "config/baseline_tied.py",
    "reduced_tied": "config/reduced_tied.py",
    "baseline_untied": "config/baseline_untied.py",
    "reduced_untied": "config/reduced_untied.py",
}
control = {"reduced_tied": "baseline_tied", "reduced_untied": "baseline_untied"}
seeds = [1, 2, 3, 4, 5]
