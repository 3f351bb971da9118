"""What MLX needs on a CPU only: a BLAS, vectorized functions, and gradients of its own kernels that are slow there."""
