"""Commands of `mlxmoe`; each parses, calls one function and prints."""
