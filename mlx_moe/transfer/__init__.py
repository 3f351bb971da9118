"""Upcycling and growth as plans: the source, destination and scale of every row of every tensor. NumPy only."""
