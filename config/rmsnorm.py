# RMSNorm in place of LayerNorm.
#     python train.py config/quick.py config/rmsnorm.py config/reduced_tied.py
norm = "rmsnorm"
