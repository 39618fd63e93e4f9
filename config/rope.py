# Rotary positions (base 10,000) in place of the position embedding.
#     python train.py config/quick.py config/rope.py config/reduced_tied.py
pos = "rope"
