# One block's weights for all layers (Theorem 4.2).
#     python train.py config/quick.py config/shared.py config/reduced_tied.py
share_layers = True
