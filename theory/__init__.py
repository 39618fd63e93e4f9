"""The paper's results as functions on weights: one file a section."""
