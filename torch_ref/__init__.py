"""The PyTorch backend: the mirror image of `mlx_moe.model`, for CUDA and CPU."""

import os

# Threads that spin while they wait make a CPU step up to eight times slower when another program needs a core; those
# that never spin make a small model's step 1.6 times slower when none does. libgomp's count gets the best of both.
# Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# In bf16, oneDNN keeps a kernel and its buffers for every number of rows that an expert ever had: up to a gigabyte, and
# no faster. 64 hold those of a dense model.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")
