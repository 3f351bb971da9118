"""Replacements for what is slow in MLX on a CPU: its BLAS, its elementwise kernels, and some of its gradients."""
