"""Training, with one loop for both backends. Imports no framework."""
