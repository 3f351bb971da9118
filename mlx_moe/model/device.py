"""The devices that MLX finds, and how fast they multiply."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar

import mlx.core as mx

from mlx_moe.accounting.machines import installed_bytes
from mlx_moe.device import CPU, CUDA, METAL, Device, requested_name
from mlx_moe.errors import InputError
from mlx_moe.model.cpu import blas
from mlx_moe.model.functional import matmul
from mlx_moe.precision import PrecisionName

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
CACHE_LIMIT_BYTES = 2 << 30
SECONDS = 0.5
ROWS = {CPU: 512, CUDA: 8192, METAL: 4096}  # of a square matrix, large enough for full speed
T = TypeVar("T")


def choose_device(requested: str | Device) -> Device:
    """Return the GPU if there is one, else the CPU; or the device asked for: `cpu`, `gpu` or a Device.

    Raises InputError for an unknown name and for a device that this machine lacks.
    """
    name = requested_name(requested)
    gpu = METAL if mx.metal.is_available() else CUDA if mx.cuda.is_available() else None
    if name not in ("auto", "cpu", "gpu"):
        raise InputError(f"--device {name!r}: mlx knows auto, cpu and gpu")
    if name == "gpu" and gpu is None:
        raise InputError("--device gpu: mlx finds neither Metal nor CUDA; take --device cpu")
    return CPU if gpu is None or name == "cpu" else gpu


def running_on(device: Device) -> AbstractContextManager[object]:
    """Make `device` MLX's default inside a `with`, and restore the process's default device and stream after it."""
    return mx.stream(mx.cpu if device == CPU else mx.gpu)


def on_its_device(method: Callable[..., T]) -> Callable[..., T]:
    """Run a method on the `device` of its object."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> T:
        with running_on(self.device):
            return method(self, *args, **kwargs)

    return run


def keep_freed_buffers() -> None:
    """Let MLX's allocator keep up to CACHE_LIMIT_BYTES of freed buffers, in the whole process and from now on.

    A limit for each call would not do: setting the lower one again frees what the next call would use.
    """
    mx.set_cache_limit(CACHE_LIMIT_BYTES)


def has_bf16(device: Device) -> bool:
    """Return whether the device multiplies bfloat16: all of MLX's do."""
    return True


def measure_flops_per_s(precision: PrecisionName, device: str | Device = "auto") -> float:
    """Return the operations per second of a square matrix product, the median of half a second of them."""
    chosen = choose_device(device)
    n = ROWS[chosen]
    seconds: list[float] = []
    with running_on(chosen):
        left, right = (mx.random.normal((n, n)).astype(DTYPES[precision]) for _ in range(2))
        mx.eval(left, right, matmul(left, right))
        while sum(seconds) < SECONDS:
            start = time.perf_counter()
            mx.eval(matmul(left, right))
            seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def device_name(device: str | Device = "auto") -> str:
    """Return the system's name for the device: `Apple M3 Max`, `NVIDIA H100 80GB HBM3`."""
    if choose_device(device) == CPU and platform.system() != "Darwin":
        return f"{platform.machine()} CPU"
    return str(mx.device_info()["device_name"])


def usable_bytes(device: str | Device = "auto") -> int:
    """Return the memory that training can take on the device if no other program takes any."""
    information = mx.device_info()
    if choose_device(device) != CPU:
        for limit in ("max_recommended_working_set_size", "total_memory"):
            if limit in information:
                return int(information[limit])
    return installed_bytes()


def threads() -> int | None:
    """Return the number of threads of a product on the CPU; None where the BLAS does not say (Accelerate)."""
    return blas.threads()


def instructions() -> str | None:
    """Name the instructions of products on the CPU; None where the BLAS does not say."""
    return blas.kernel()


def set_threads(n: int) -> None:
    """Set the number of threads of a product on the CPU, where the BLAS lets us."""
    blas.set_threads(n)
