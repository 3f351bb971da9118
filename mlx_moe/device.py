"""The device that a model runs on, as every backend names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Device:
    """A kind of device, and the label that people and files get."""

    kind: DeviceKind
    label: str


CPU = Device("cpu", "CPU")
CUDA = Device("gpu", "CUDA")
METAL = Device("gpu", "Metal")
MPS = Device("gpu", "Metal (MPS)")  # Apple's GPU as PyTorch drives it


def requested_name(requested: str | Device) -> str:
    """Return the name that a backend's `choose_device` looks up: a device asks for its kind."""
    return requested.kind if isinstance(requested, Device) else requested
