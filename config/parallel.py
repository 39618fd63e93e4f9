# Attention and MLP side by side in one skip connection.
parallel = True
