"""Table of machines: peak rates, memory bandwidth, memory sizes.

Apple states bandwidth and memory; its GPUs compute 128 multiply-adds per core and cycle in fp32, fp16 and bf16 alike,
and Apple has stated the resulting TFLOP/s for M1 and M2. NVIDIA's figures are from its datasheets, dense: half of those
advertised "with sparsity". fp32 is the rate of the CUDA cores, since our fp32 is never TF32.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from mlx_moe.errors import InputError, quoted
from mlx_moe.precision import PrecisionName
from mlx_moe.validation import nearest

# Share of a Mac's memory that Metal lets one process use (`recommendedMaxWorkingSetSize`): 11.84 of 16 GB on an M3,
# more on larger ones (107.5 of 128 GB). `sudo sysctl iogpu.wired_limit_mb` raises it.
METAL_SHARE = 0.74
# A CUDA context, its libraries, and unusable remainders of the allocator's blocks.
CUDA_RESERVED_GB = 1.0


@dataclass(frozen=True)
class Machine:
    """The largest GPU of its name: dense TFLOP/s, GB/s, and all memory sizes sold, in GB."""

    name: str
    vendor: Literal["apple", "nvidia"]
    fp32: float
    fp16: float
    bf16: float | None  # None: no hardware for it
    bandwidth: float
    memory: tuple[int, ...]
    estimated: bool = False  # some figures are not the vendor's

    def flops_per_s(self, precision: PrecisionName) -> float:
        tflops = {"fp32": self.fp32, "bf16": self.bf16 or self.fp32, "fp16": self.fp16}[precision]
        return tflops * 1e12

    def usable_bytes(self, memory_gb: float) -> int:
        """Return the bytes of memory that a training process can use."""
        if self.vendor == "apple":
            return int(memory_gb * METAL_SHARE * 2**30)
        return int((memory_gb - CUDA_RESERVED_GB) * 2**30)


def _apple(name: str, tflops: float, bandwidth: float, memory: tuple[int, ...], half: float | None = None) -> Machine:
    estimated = not name.startswith(("M1", "M2"))
    return Machine(f"Apple {name}", "apple", tflops, half or tflops, half or tflops, bandwidth, memory, estimated)


def _nvidia(
    name: str, fp32: float, fp16: float, bf16: float | None, bandwidth: float, memory: tuple[int, ...]
) -> Machine:
    return Machine(f"NVIDIA {name}", "nvidia", fp32, fp16, bf16, bandwidth, memory)


def installed_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# fmt: off
MACHINES = (
    # apple.com/newsroom: M1 2.6 TFLOPS (2020/11), M1 Pro 5.2 and M1 Max 10.4 (2021/10), M1 Ultra 21 (2022/03)
    _apple("M1", 2.6, 68, (8, 16)),
    _apple("M1 Pro", 5.2, 200, (16, 32)),
    _apple("M1 Max", 10.4, 400, (32, 64)),
    _apple("M1 Ultra", 21.0, 800, (64, 128)),
    # apple.com/newsroom: M2 3.6 TFLOPS (2022/06); Pro 19, Max 38, Ultra 76 cores at the same clock (2023/01, 2023/06)
    _apple("M2", 3.6, 100, (8, 16, 24)),
    _apple("M2 Pro", 6.8, 200, (16, 32)),
    _apple("M2 Max", 13.6, 400, (32, 64, 96)),
    _apple("M2 Ultra", 27.2, 800, (64, 128, 192)),
    # Bandwidth, cores (10, 18, 40, 80), memory: apple.com/newsroom 2023/10, 2025/03. TFLOPS: cores × 256 × 1.398 GHz
    # (hmc-tech.com; others report up to 1.6 GHz)
    _apple("M3", 3.6, 100, (8, 16, 24)),
    _apple("M3 Pro", 6.4, 150, (18, 36)),
    _apple("M3 Max", 14.3, 400, (36, 48, 64, 96, 128)),
    _apple("M3 Ultra", 28.6, 819, (96, 256, 512)),
    # Bandwidth, cores (10, 20, 40), memory: apple.com/newsroom 2024/05, 2024/10. TFLOPS: cores × 256 × 1.47 GHz (M4),
    # 1.678 GHz (Pro, Max) (hmc-tech.com)
    _apple("M4", 3.8, 120, (16, 24, 32)),
    _apple("M4 Pro", 8.6, 273, (24, 48, 64)),
    _apple("M4 Max", 17.2, 546, (36, 48, 64, 128)),
    # Bandwidth, cores (10, 20, 40), memory: apple.com/newsroom 2025/10, 2026/03. Estimated: fp32 as M4 and 20 %
    # (Apple's "graphics up to 20 % faster"), half precision 4 × M4 (Apple's "over 4x the peak GPU compute for AI")
    _apple("M5", 4.6, 153, (16, 24, 32), half=15.2),
    _apple("M5 Pro", 10.3, 307, (24, 48, 64), half=34.4),
    _apple("M5 Max", 20.6, 614, (36, 48, 64, 128), half=68.8),
    # nvidia.com datasheets of each card; Turing and Volta have no bf16
    _nvidia("T4", 8.1, 65, None, 320, (16,)),
    _nvidia("V100", 15.7, 125, None, 900, (16, 32)),
    _nvidia("A10", 31.2, 125, 125, 600, (24,)),
    _nvidia("A100", 19.5, 312, 312, 2039, (40, 80)),
    _nvidia("L4", 30.3, 121, 121, 300, (24,)),
    _nvidia("L40S", 91.6, 362, 362, 864, (48,)),
    _nvidia("H100", 66.9, 989, 989, 3350, (80, 94)),
    _nvidia("H100 PCIe", 51.2, 756, 756, 2000, (80,)),
    _nvidia("H200", 66.9, 989, 989, 4800, (141,)),
    _nvidia("GH200", 66.9, 989, 989, 4000, (96, 144)),
    _nvidia("B200", 75.0, 2250, 2250, 7700, (180, 192)),
    # GA102 and Ada whitepapers: tensor cores that accumulate in fp32, as PyTorch has them do
    _nvidia("GeForce RTX 3090", 35.6, 71, 71, 936, (24,)),
    _nvidia("GeForce RTX 4090", 82.6, 165, 165, 1008, (24,)),
    # Blackwell whitepaper for GeForce
    _nvidia("GeForce RTX 5090", 104.8, 209.5, 209.5, 1792, (32,)),
)
# fmt: on

OTHER_CARDS = {"laptop", "ti", "super", "d"}  # these share a name with a card of the table, but not its figures


def lookup(device_name: str) -> Machine | None:
    """Return the machine with the reported name (`Apple M3 Max`, `NVIDIA H100 80GB HBM3`, `Tesla T4`), or None."""
    words = _words(device_name)
    if OTHER_CARDS & set(words):
        return None
    fitting = [machine for machine in MACHINES if _is_part(_words(machine.name.removeprefix("NVIDIA ")), words)]
    return max(fitting, key=lambda machine: len(_words(machine.name)), default=None)


def choose_machine(text: str) -> tuple[Machine, int]:
    """Return the machine and memory in GB that `M2 Max 32GB` names; without a size, the smallest sold.

    Raises InputError for an unknown machine, and for a size that was not sold.
    """
    size = re.search(r"(\d{1,6})\s*(gb|g)\b", text, re.IGNORECASE)
    name = text[: size.start()] if size else text
    machine = next((machine for machine in MACHINES if _words(name) in _spellings(machine)), None)
    if machine is None:
        known = [machine.name.split(maxsplit=1)[1] for machine in MACHINES]
        raise InputError(
            f"--machine {quoted(text)}: not known; {nearest(name.strip(), known)}known: {', '.join(known)}"
        )
    memory_gb = int(size[1]) if size else machine.memory[0]
    if memory_gb not in machine.memory:
        sizes = ", ".join(str(gb) for gb in machine.memory)
        raise InputError(f"--machine {quoted(text)}: the {machine.name} comes with {sizes} GB")
    return machine, memory_gb


def _spellings(machine: Machine) -> list[list[str]]:
    """Return the words of the name with and without its optional prefixes: `nvidia geforce rtx 4090`, …, `4090`."""
    spellings = [_words(machine.name)]
    while spellings[-1][0] in ("apple", "nvidia", "geforce", "rtx"):
        spellings.append(spellings[-1][1:])
    return spellings


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _is_part(words: list[str], of: list[str]) -> bool:
    return any(of[start : start + len(words)] == words for start in range(len(of)))
