# Which of W_Q, W_K and W_V can be the identity? The arms differ in nothing else; each has both attention scales.
#     python sweep.py config/study_which.py config/quick.py
arms = {
    "baseline": "config/baseline_tied.py",
    "wq_identity": "config/baseline_tied.py --wq_identity",
    "wk_identity": "config/baseline_tied.py --wk_identity",
    "wv_identity": "config/baseline_tied.py --wv_identity",
}
control = "baseline"
grid = {"attn_scale": [0.5, 1]}
seeds = [1, 2, 3]
