"""The precision of a training step's products, and the loss scale that keeps float16 from underflowing.

==== ==============================================================================
fp32 everything in float32
bf16 matrix products in bfloat16: projections, attention, experts, head
fp16 the same in float16, with the loss scaled up so that small gradients survive
==== ==============================================================================

In all three, the weights, the residual stream, norms, routers, softmax, loss, the weights' gradients and the moments
are float32, and so is everything outside a step: evaluation, certificates, generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_moe.device import CUDA, Device
from mlx_moe.parameters import Arrays

PrecisionName = Literal["fp32", "bf16", "fp16"]

GROWTH_INTERVAL = 2000  # overflow-free steps after which the scale doubles (PyTorch's GradScaler)
LARGEST_SCALE = 2.0**24


@dataclass(frozen=True)
class Precision:
    """A chosen precision, and the reason for it."""

    name: PrecisionName
    reason: str


def choose_precision(requested: Literal["auto", "fp32", "bf16", "fp16"], device: Device, has_bf16: bool) -> Precision:
    """Resolve `engine.precision` on a device."""
    if requested != "auto":
        return Precision(requested, f"{requested} as asked for")
    if device.kind == "cpu":
        return Precision("fp32", "fp32: a CPU takes longer for half precision")
    if device != CUDA:
        return Precision("fp32", f"fp32 on {device.label}; engine.precision=bf16 takes less memory")
    if has_bf16:
        return Precision("bf16", "bf16: this GPU multiplies it many times faster than fp32")
    return Precision("fp16", "fp16 with loss scaling: this GPU has no bf16")


def without_loss_scale(state: Arrays) -> Arrays:
    """Return the optimizer's own part of a state, for the optimizer to check."""
    return {name: array for name, array in state.items() if name not in ("loss_scale", "good_steps")}


@dataclass
class LossScale:
    """A factor that keeps small gradients from underflowing: dynamic in fp16 (Micikevicius et al. 2018), else 1.

    The scale halves when a gradient overflows, and that step is left out. It doubles after GROWTH_INTERVAL steps
    without an overflow.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    is_dynamic: bool = True

    @classmethod
    def of(cls, precision: PrecisionName) -> LossScale:
        """Return the scale that training in this precision starts with."""
        return cls() if precision == "fp16" else cls(scale=1.0, is_dynamic=False)

    def arrays(self) -> Arrays:
        """Return what a checkpoint keeps beside the optimizer's state; nothing of a constant scale."""
        if not self.is_dynamic:
            return {}
        return {
            "loss_scale": np.array(self.scale, np.float32),
            "good_steps": np.array(self.good_steps, np.float32),
        }

    def load(self, state: Arrays) -> None:
        """Continue from a checkpoint; one of another precision leaves the scale as it is."""
        if self.is_dynamic:
            self.scale = float(state.get("loss_scale", self.scale))
            self.good_steps = int(state.get("good_steps", self.good_steps))

    def accepts(self, grad_norm: float) -> bool:
        """Adapt the scale to a step's gradient norm; return False if a gradient overflowed, and the step with it."""
        overflowed = not math.isfinite(grad_norm)
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(LARGEST_SCALE, self.scale * 2), 0
        return not overflowed
