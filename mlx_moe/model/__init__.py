"""The MLX backend. A fast BLAS, where MLX needs one, is loaded before MLX is."""

from mlx_moe.model.blas import load_fast_blas

FAST_BLAS = load_fast_blas()
