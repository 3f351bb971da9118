"""A fast BLAS for MLX on Linux CPUs.

The Linux wheel of MLX carries reference BLAS (6 GFLOP/s). A fast one that stands in the global symbol scope before
MLX is loaded takes its place (200 GFLOP/s on two cores). macOS uses Accelerate and needs nothing.
"""

import ctypes
import os
import sys
from pathlib import Path


def load_fast_blas() -> str:
    """Load OpenBLAS into the global symbol scope. Returns what was done, in a few words; never raises."""
    if sys.platform != "linux":
        return "Accelerate"
    if "mlx.core" in sys.modules:
        return "none: mlx was imported before mlx_moe.model, too late to give it a fast BLAS"
    if (kernel := _openblas_kernel()) is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernel)
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "none: MLX is about 30 times slower without it; apt-get install libopenblas0-pthread"
    return "OpenBLAS (libopenblas.so.0)"


def threads() -> int | None:
    """Return the number of threads of the loaded OpenBLAS; None without one."""
    count = getattr(_openblas(), "openblas_get_num_threads", None)
    return None if count is None else int(count())


def set_threads(n: int) -> None:
    """Let the loaded OpenBLAS take so many threads; nothing without one."""
    choose = getattr(_openblas(), "openblas_set_num_threads", None)
    if choose is not None:
        choose(n)


def kernel() -> str | None:
    """Name the processor that the loaded OpenBLAS takes this one for, which orders its sums; None without one."""
    name = getattr(_openblas(), "openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    found: bytes | None = name()
    return None if found is None else found.decode()


def _openblas() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libopenblas.so.0", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


def _openblas_kernel() -> str | None:
    # Debian's OpenBLAS falls back to kernels of 2004 on a CPU newer than itself, at a fifth of the speed.
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return None
    if {"avx512f", "avx512bw"} <= flags:
        return "SkylakeX"
    return "Haswell" if "avx2" in flags else None
