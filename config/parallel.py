# Attention and MLP side by side in one skip connection.
#     python train.py config/quick.py config/parallel.py config/reduced_tied.py
parallel = True
