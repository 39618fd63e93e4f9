"""How speed is measured and planned; see README.md beside this file."""
