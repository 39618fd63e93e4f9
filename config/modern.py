# Today's recipe in place of GPT-2's: rotary positions, RMSNorm, normalised queries and keys, squared ReLU. Does W_Q = I
# hold up under it? (activation = "swiglu" with mlp_ratio = 8/3, or 2.625 where that is no whole width, is the other
# usual MLP.) With --optimizer=muon the matrices of the blocks take Muon's steps.
#     python train.py config/quick.py config/modern.py config/reduced_tied.py
pos = "rope"
norm = "rmsnorm"
qk_norm = True
activation = "relu_squared"
