"""Devices that a model runs on, with the same names in all backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["mlx", "torch"]
DeviceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Device:
    """A kind of device, and the label shown to people and written to files."""

    kind: DeviceKind
    label: str


CPU = Device("cpu", "CPU")
CUDA = Device("gpu", "CUDA")
METAL = Device("gpu", "Metal")
MPS = Device("gpu", "Metal (MPS)")  # Apple's GPU in PyTorch


def requested_name(requested: str | Device) -> str:
    """Return the name that a backend's `choose_device` looks up: for a Device, its kind."""
    return requested.kind if isinstance(requested, Device) else requested
