"""Data pipeline: text to token files to batches. NumPy only."""
