"""How speed is measured and planned."""
