"""Do both backends compute the same thing? Knows both, and neither knows it."""
