"""The PyTorch backend: the mirror image of `mlx_moe.model`, for CUDA and CPU.

What PyTorch reads when it is loaded is set here, before it is.
"""

import contextlib
import os
from pathlib import Path

from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import cache_folder


def place_compiler_cache() -> None:
    """Place the folder that PyTorch's compiler makes as it loads beside our caches, if that is possible.

    By default it stays in the folder for temporary files.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError, InputError):
            folder = cache_folder() / "torch"
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _cores_are_taken() -> bool:
    """Return whether more threads want to run now than there are cores; False if the system does not say."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running > (os.cpu_count() or 1)


# Threads that spin while they wait, as PyTorch's do by default, make a small model's step 1.3 to 1.5 times faster on
# idle cores, and 12 times slower on cores that another program wants too.
if _cores_are_taken():
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# In bf16, oneDNN keeps a kernel and its buffers for every number of rows that an expert ever had: up to a gigabyte, and
# no faster. 64 hold those of a dense model.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")
