# A mixture of four experts, two for each token, in place of the MLP.
n_expert = 4
n_expert_active = 2
