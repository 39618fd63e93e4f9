# One block's weights for all layers (Theorem 4.2).
share_layers = True
