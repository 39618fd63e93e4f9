# A mixture of four experts in place of the MLP, two of them active for each token.
#     python train.py config/quick.py config/moe.py config/reduced_tied.py
n_expert = 4
n_expert_active = 2
