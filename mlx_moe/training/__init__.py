"""One training loop for both backends. Imports no framework."""
