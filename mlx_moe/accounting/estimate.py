"""Resources of a phase on a machine: memory, time, largest batch, and changes that make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_moe.accounting.flops import Flops, flops_per_token
from mlx_moe.accounting.machines import Machine
from mlx_moe.accounting.memory import StepMemory, step_memory
from mlx_moe.accounting.parameters import ParameterCount, count_parameters
from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import CUDA, METAL, BackendName, DeviceKind
from mlx_moe.precision import PrecisionName, choose_precision

LARGEST_BATCH = 4096
# Share of a machine's rate for large matrix products that whole training steps reach. Measured on two CPU cores at
# width 512, dense and experts: PyTorch 0.50 to 0.62, MLX 0.47 to 0.54. Assumed to be the same on GPUs.
EFFICIENCY = 0.5
# Share of a stated peak that large matrix products reach: 2.9 of 3.8 TFLOP/s on an M4 (Hübner et al. 2025).
PRODUCTS_OF_PEAK = 0.75
TRAFFIC = 7  # memory accesses per weight of an update: weight, gradient and two moments read, three of them written


@dataclass(frozen=True)
class Workload:
    """Workload of a phase: the model, how it is trained, and for how long."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    batch_size: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.model.context_length

    @property
    def parameters(self) -> ParameterCount:
        return count_parameters(self.model)

    @property
    def flops(self) -> Flops:
        return flops_per_token(self.model)


@dataclass(frozen=True)
class Target:
    """A machine with its memory, as a backend uses it. `flops_per_s` is its rate of matrix products."""

    label: str
    backend: BackendName
    device: DeviceKind
    precision: PrecisionName
    usable_bytes: int
    flops_per_s: float
    bytes_per_s: float | None  # memory bandwidth; None: unknown


@dataclass(frozen=True)
class Estimate:
    """Estimate of a phase on a machine.

    `largest_batch` 0: not even one sequence fits; `remedies`: overrides that make it fit.
    """

    memory: StepMemory
    fits: bool
    largest_batch: int
    seconds: float
    remedies: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory.to_json()}


def site_of(machine: Machine, memory_gb: int, engine: EngineConfig) -> Target:
    """Return a machine of the table as a target: MLX on Apple's, PyTorch on NVIDIA's; "auto" precision is resolved."""
    device = METAL if machine.vendor == "apple" else CUDA
    precision = choose_precision(engine.precision, device, has_bf16=machine.bf16 is not None).name
    return Target(
        label=f"{machine.name.removeprefix('NVIDIA ').removeprefix('Apple ')} {memory_gb}GB",
        backend="mlx" if machine.vendor == "apple" else "torch",
        device=device.kind,
        precision=precision,
        usable_bytes=machine.usable_bytes(memory_gb),
        flops_per_s=PRODUCTS_OF_PEAK * machine.flops_per_s(precision),
        bytes_per_s=machine.bandwidth * 1e9,
    )


def fit(work: Workload, site: Target) -> Estimate:
    memory = _memory(work, site)
    fits = memory.peak <= site.usable_bytes
    return Estimate(
        memory, fits, _largest_batch(work, site), seconds(work, site), [] if fits else list(_ways_out(work, site))
    )


def seconds(work: Workload, site: Target) -> float:
    """Estimate the time of a phase: products at EFFICIENCY of the machine's rate, then the updates' memory traffic."""
    recomputed = 4 / 3 if work.engine.activation_checkpointing else 1.0
    products = recomputed * work.tokens * work.flops.training / (EFFICIENCY * site.flops_per_s)
    updated = work.steps * TRAFFIC * 4 * work.parameters.total
    return products + (updated / site.bytes_per_s if site.bytes_per_s else 0.0)


def _largest_batch(work: Workload, site: Target) -> int:
    """Return the largest batch in sequences, a multiple of the accumulation steps, capped at LARGEST_BATCH."""
    parts = work.engine.accumulation_steps
    low, high = 0, max(1, LARGEST_BATCH // parts)
    while low < high:
        middle = (low + high + 1) // 2
        fitting = _memory(replace(work, batch_size=middle * parts), site).peak <= site.usable_bytes
        low, high = (middle, high) if fitting else (low, middle - 1)
    return low * parts


def _ways_out(work: Workload, site: Target) -> Iterator[str]:
    """Yield overrides that make the phase fit: each one that suffices alone, else the first sufficient combination."""
    B = work.batch_size
    parts = [n for n in _divisors(B) if n > work.engine.accumulation_steps]
    half = {"precision": "bf16"} if site.precision == "fp32" else {}
    recomputing = {"activation_checkpointing": True}
    alone = False
    for options in ([{"accumulation_steps": n} for n in parts], [recomputing], [half] if half else []):
        fitting = next((option for option in options if _fits(work, site, option)), None)
        if fitting is not None:
            alone = True
            yield _as_overrides(fitting)
    if smaller := _largest_batch(work, site):
        alone = True
        yield f"-o training.batch_size={smaller}"
    if work.optimizer.name == "adamw" and _fits(work, site, {}, "muon"):
        alone = True
        yield "-o optimizer.name=muon"
    if alone:
        return
    for optimizer in dict.fromkeys([work.optimizer.name, "muon"]):
        for option in (recomputing | {"accumulation_steps": B}, recomputing | {"accumulation_steps": B} | half):
            if _fits(work, site, option, optimizer):
                yield _as_overrides(option) + (" -o optimizer.name=muon" if optimizer != work.optimizer.name else "")
                return


def _divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*small, *(number // n for n in reversed(small) if n * n != number)]


def _fits(work: Workload, site: Target, engine: dict[str, Any], optimizer: str | None = None) -> bool:
    changed = replace(
        work,
        engine=work.engine.model_copy(update=engine),
        optimizer=work.optimizer.model_copy(update={"name": optimizer or work.optimizer.name}),
    )
    site = replace(site, precision=engine.get("precision", site.precision))
    return _memory(changed, site).peak <= site.usable_bytes


def _as_overrides(engine: dict[str, Any]) -> str:
    return " ".join(f"-o engine.{name}={str(value).lower()}" for name, value in engine.items())


def _memory(work: Workload, site: Target) -> StepMemory:
    engine = work.engine.model_copy(update={"precision": site.precision})
    return step_memory(work.model, work.optimizer, engine, work.batch_size, site.backend, site.device)
