"""Parity of the two backends, and of libraries: the only package that knows both backends."""
