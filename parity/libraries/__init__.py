"""Models as other libraries open them. A module imports its framework, and nothing else in parity does."""
