"""The devices that PyTorch finds, and how fast they multiply."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time

import torch

from mlx_moe.accounting.machines import CUDA_RESERVED_GB, METAL_SHARE, installed_bytes
from mlx_moe.device import CPU, CUDA, MPS, Device, requested_name
from mlx_moe.errors import InputError
from mlx_moe.precision import PrecisionName
from mlx_moe.training.backend import Tokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {CPU: "cpu", CUDA: "cuda", MPS: "mps"}  # PyTorch's names
SECONDS = 0.5
ROWS = {CPU: 512, CUDA: 8192, MPS: 4096}  # of a square matrix, large enough for full speed


def choose_device(requested: str | Device) -> Device:
    """Return CUDA if there is one, else the CPU; or the device asked for: `cpu`, `gpu`, `cuda`, `mps` or a Device.

    Apple's MPS is taken on request only.
    Raises InputError for an unknown name and for a device that this machine lacks.
    """
    name = requested_name(requested)
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    gpu = CUDA if has_cuda else MPS if has_mps else None
    if name not in ("auto", "cpu", "gpu", "cuda", "mps"):
        raise InputError(f"--device {name!r}: torch knows auto, cpu, gpu, cuda and mps")
    if name == "gpu" and gpu is None:
        raise InputError("--device gpu: torch finds neither CUDA nor MPS; take --device cpu")
    if name == "cuda" and not has_cuda:
        raise InputError("--device cuda: torch finds no CUDA device; take --device cpu")
    if name == "mps" and not has_mps:
        raise InputError("--device mps: torch finds no MPS device; take --device cpu")
    if name == "auto":
        return CUDA if has_cuda else CPU
    return {"cpu": CPU, "cuda": CUDA, "mps": MPS}.get(name) or gpu or CPU


def torch_device(device: Device) -> torch.device:
    """Return PyTorch's own handle of a device."""
    return torch.device(TYPES[device])


def to_device(tokens: Tokens, device: Device) -> torch.Tensor:
    """Copy tokens to a device."""
    tensor = torch.from_numpy(tokens).long()
    if device != CUDA:
        return tensor.to(torch_device(device))
    return tensor.pin_memory().to(torch_device(device), non_blocking=True)  # unpinned, it waits for the step before


def has_bf16(device: Device) -> bool:
    """Return False for a CUDA device whose hardware does not multiply bfloat16."""
    return device != CUDA or torch.cuda.is_bf16_supported(including_emulation=False)


def measure_flops_per_s(precision: PrecisionName, device: str | Device = "auto") -> float:
    """Return the operations per second of a square matrix product, the median of half a second of them."""
    chosen = choose_device(device)
    n, place = ROWS[chosen], torch_device(chosen)
    left, right = (torch.randn(n, n, device=place, dtype=DTYPES[precision]) for _ in range(2))
    _wait(left @ right)
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        _wait(left @ right)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def device_name(device: str | Device = "auto") -> str:
    """Return the system's name for the device: `NVIDIA H100 80GB HBM3`, `Apple M3 Max`."""
    if choose_device(device) == CUDA:
        return torch.cuda.get_device_name()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{platform.machine()} CPU"


def usable_bytes(device: str | Device = "auto") -> int:
    """Return the memory that training can take on the device if no other program takes any."""
    chosen = choose_device(device)
    if chosen == CUDA:
        return torch.cuda.get_device_properties(torch_device(chosen)).total_memory - int(CUDA_RESERVED_GB * 2**30)
    return int(METAL_SHARE * installed_bytes()) if chosen == MPS else installed_bytes()


def threads() -> int | None:
    """Return the number of threads of a product on the CPU."""
    return torch.get_num_threads()


def instructions() -> str | None:
    """Name the instructions of products on the CPU, such as AVX512, and the BLAS where it is not PyTorch's own.

    If the MLX backend was imported first, PyTorch uses its OpenBLAS, which stands in the global symbol scope.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    loaded = list(sys.modules)
    mlx = sys.modules.get("mlx_moe.model")
    if mlx is None or not mlx.FAST_BLAS.startswith("OpenBLAS") or loaded.index("torch") < loaded.index("mlx_moe.model"):
        return capability
    return f"{capability} with OpenBLAS"


def set_threads(n: int) -> None:
    """Set the number of threads of a product on the CPU."""
    torch.set_num_threads(n)


def _wait(product: torch.Tensor) -> None:
    product[0, 0].item()
