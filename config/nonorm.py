# No normalisation at all, as in the theorems of Section 4.
#     python train.py config/quick.py config/nonorm.py config/reduced_tied.py
norm = "none"
