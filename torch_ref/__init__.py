"""The PyTorch backend: the mirror image of `mlx_moe.model`, for CUDA and CPU."""

import os

# Threads that spin while they wait make a CPU step ten times slower when another program needs a core.
# Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
