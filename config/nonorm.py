# No normalisation at all, as in the theorems of Section 4.
norm = "none"
