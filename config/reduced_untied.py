# Table 2, "Reduced (untied)": W_Q = I, scale 1/(2√d_k), weight decay 2⁻⁵. The paper's validation loss: 2.86.
#     python train.py config/reduced_untied.py
wq_identity = True
attn_scale = 0.5  # logits start as large as the baseline's at n_embd 768; elsewhere see attn_logit_std
weight_decay = 2**-5  # Table 2 has a dash for attention; Section 5.2.2 and the authors' configurations have it for all
tie_weights = False
