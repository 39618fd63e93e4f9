# Does the difference close with width? From half to twice the size's n_embd, with heads of the same d_k and a learning
# rate in inverse proportion. At the start of training the attention logits grow with √n_embd for W_Q = I, and with
# n_embd for the baseline.
arms = {"baseline": "config/baseline_tied.py", "reduced": "config/reduced_tied.py"}
control = "baseline"
grid = {
    "n_embd": {
        "{n_embd}//2": "--n_head={n_head}//2 --learning_rate={learning_rate}*2",
        "{n_embd}": "--n_head={n_head}",
        "{n_embd}*2": "--n_head={n_head}*2 --learning_rate={learning_rate}/2",
    }
}
seeds = [1, 2, 3]
