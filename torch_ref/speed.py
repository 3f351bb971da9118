"""What the device is, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time

import torch

from mlx_moe.accounting.machines import CUDA_RESERVED_GB, METAL_SHARE
from mlx_moe.precision import PrecisionName
from torch_ref.trainer import DEVICES, DTYPES, choose_device

SECONDS = 0.5
N = {"cpu": 512, "cuda": 8192, "mps": 4096}  # rows of a square matrix, large enough for full speed


def measure_flops_per_s(precision: PrecisionName, device: str = "auto") -> float:
    """Operations per second of a square matrix product, the median of half a second of them."""
    place = choose_device(device)
    n = N[place.type]
    one, other = (torch.randn(n, n, device=place, dtype=DTYPES[precision]) for _ in range(2))
    _wait(one @ other)
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        _wait(one @ other)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def device_kind(device: str = "auto") -> str:
    """`CUDA`, `Metal (MPS)` or `CPU`."""
    return DEVICES.get(choose_device(device).type, "CPU")


def device_name(device: str = "auto") -> str:
    """The name that the system gives the device: `NVIDIA H100 80GB HBM3`, `Apple M3 Max`."""
    place = choose_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{platform.machine()} CPU"


def usable_bytes(device: str = "auto") -> int:
    """The memory that training can take on the device, other programs aside."""
    place = choose_device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory - int(CUDA_RESERVED_GB * 2**30)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(METAL_SHARE * installed) if place.type == "mps" else installed


def threads() -> int | None:
    """How many threads a product takes on the CPU."""
    return torch.get_num_threads()


def instructions() -> str | None:
    """Name the instructions that products take on the CPU, such as AVX512."""
    return torch.backends.cpu.get_cpu_capability()


def set_threads(n: int) -> None:
    """Let products take so many threads on the CPU."""
    torch.set_num_threads(n)


def _wait(product: torch.Tensor) -> None:
    product[0, 0].item()
