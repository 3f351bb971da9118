"""The PyTorch backend: the mirror image of `mlx_moe.model`, for CUDA and CPU."""
