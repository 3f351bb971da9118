"""The MLX backend. What MLX reads when it is loaded is set here, before it is."""

import os

from mlx_moe.model.cpu.blas import load_fast_blas

# On an M5 and on CUDA, MLX multiplies float32 in TF32 unless told otherwise, at errors near 1e-3
# (github.com/ml-explore/mlx/issues/3860); boundaries are proven to 1e-4, so float32 is to mean float32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
FAST_BLAS = load_fast_blas()
