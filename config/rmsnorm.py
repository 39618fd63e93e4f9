# RMSNorm in place of LayerNorm.
norm = "rmsnorm"
