"""What the device is, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import statistics
import time

import mlx.core as mx

from mlx_moe.model import blas
from mlx_moe.model.elementwise import widened
from mlx_moe.model.trainer import DTYPES, choose_device
from mlx_moe.precision import PrecisionName

SECONDS = 0.5
N = {"CPU": 512, "CUDA": 8192, "Metal": 4096}  # rows of a square matrix, large enough for full speed


def measure_flops_per_s(precision: PrecisionName, device: str = "auto") -> float:
    """Operations per second of a square matrix product, the median of half a second of them."""
    n = N[choose_device(device)]
    one, other = (mx.random.normal((n, n)).astype(DTYPES[precision]) for _ in range(2))
    mx.eval(one, other, widened(mx.matmul, one, other))
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        mx.eval(widened(mx.matmul, one, other))
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def device_kind(device: str = "auto") -> str:
    """`CUDA`, `Metal` or `CPU`."""
    return choose_device(device)


def device_name(device: str = "auto") -> str:
    """The name that the system gives the device: `Apple M3 Max`, `NVIDIA H100 80GB HBM3`."""
    if choose_device(device) == "CPU" and platform.system() != "Darwin":
        return f"{platform.machine()} CPU"
    return str(mx.device_info()["device_name"])


def usable_bytes(device: str = "auto") -> int:
    """The memory that training can take on the device, other programs aside."""
    information = mx.device_info()
    if choose_device(device) != "CPU":
        for limit in ("max_recommended_working_set_size", "total_memory"):
            if limit in information:
                return int(information[limit])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def threads() -> int | None:
    """How many threads a product takes on the CPU; None where the BLAS does not say (Accelerate)."""
    return blas.threads()


def instructions() -> str | None:
    """Name the instructions that products take on the CPU; None where the BLAS does not say."""
    return blas.kernel()


def set_threads(n: int) -> None:
    """Let products take so many threads on the CPU, where that can be said."""
    blas.set_threads(n)
