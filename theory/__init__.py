"""The paper's results as functions on weights, one file per section; see theory/README.md."""
