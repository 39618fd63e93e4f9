# Rotary positions (base 10,000) in place of the position embedding.
pos = "rope"
