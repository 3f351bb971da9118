"""Upcycling and growth as plans: which row of which tensor goes where, times what. NumPy only."""
