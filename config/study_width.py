# Does the difference close with width? From half to twice the size's n_embd, with heads of the same d_k and a learning
# rate in inverse proportion. With the scales of the arms' files new attention logits grow with √n_embd for W_Q = I, and
# with n_embd for the baseline; here they are as large at every width, as suits n_embd 128.
#     python sweep.py config/study_width.py config/quick.py --attn_logit_std=small
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
seeds = [1, 2, 3]


def grid(size):
    return [
        dict(n_embd=size.n_embd // 2, n_head=size.n_head // 2, learning_rate=size.learning_rate * 2),
        dict(n_embd=size.n_embd, n_head=size.n_head, learning_rate=size.learning_rate),
        dict(n_embd=size.n_embd * 2, n_head=size.n_head * 2, learning_rate=size.learning_rate / 2),
    ]
