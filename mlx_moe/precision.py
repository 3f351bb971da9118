"""Precision of a training step's matrix products, and float16's loss scaling.

==== ==============================================================================
fp32 everything in float32
bf16 matrix products in bfloat16: projections, attention, experts, head
fp16 the same in float16, with the loss scaled up so that small gradients survive
==== ==============================================================================

In all three, the weights, the residual stream, norms, routers, softmax, loss, the weights' gradients and the moments
are float32, and so is everything outside a step: evaluation, certificates, generation.
"""

from __future__ import annotations

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
    """Return the state without the loss scale, for the optimizer to check."""
    return {name: array for name, array in state.items() if name not in ("loss_scale", "good_steps")}


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018).

    Halved when a gradient overflows, and that step is skipped; doubled after GROWTH_INTERVAL steps without overflow.
    """

    scale: float = 2.0**16
    good_steps: int = 0

    def arrays(self) -> Arrays:
        """Return the arrays that a checkpoint keeps beside the optimizer's state."""
        return {
            "loss_scale": np.array(self.scale, np.float32),
            "good_steps": np.array(self.good_steps, np.float32),
        }

    def load(self, state: Arrays) -> None:
        """Restore from a checkpoint; a checkpoint of another precision leaves the scale unchanged."""
        self.scale = float(state.get("loss_scale", self.scale))
        self.good_steps = int(state.get("good_steps", self.good_steps))

    def update(self, overflowed: bool) -> None:
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(LARGEST_SCALE, self.scale * 2), 0
