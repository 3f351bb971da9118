"""Text in, token files and batches out. NumPy only."""
