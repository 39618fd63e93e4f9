# A run of minutes on two CPU cores: a small model on the embedded corpus, one token per byte. Prepare the
# data once with `python prepare_owt.py --source=stdlib`. A variant's file comes after this one:
#     python train.py config/quick.py config/reduced_tied.py
# The scales of the variants' files are the paper's, for n_embd 768. In their place --attn_logit_std=small has what
# suits W_Q and W_Q = I at 128 (results/study_scale), and for other queries what suits W_Q = I; in studies, too, unless
# they are about the scale.
dataset = "stdlib"
vocab_size = 320  # 256 bytes and end-of-text, padded to a multiple of 64
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

tokens_per_step = 32 * 128
batch_size = 32
max_iters = 400
lr_decay_iters = None  # the cosine ends with the run
learning_rate = 3e-3
warmup_iters = 40

eval_interval = 50
eval_windows = 256
save_steps = ()
