"""The processes that train together: what a process asks of the others, and a process alone."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_moe.errors import InputError

BYTES_TO_START = 250_000_000  # of address space: NumPy's products end the process below 160 MB on two cores


class World(Protocol):
    """The processes that train together, this one among them; process 0 alone reads and writes the run's folder."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def largest(self, value: int) -> int:
        """The largest of the processes' values; asks the hosts and leaves the devices alone."""

    def from_first(self, data: bytes) -> bytes:
        """What process 0 has; what the others have is not looked at."""


@dataclass(frozen=True)
class Alone:
    """A world of one."""

    rank: int = 0
    size: int = 1

    def largest(self, value: int) -> int:
        return value

    def from_first(self, data: bytes) -> bytes:
        return data


def check_address_space_to_start() -> None:
    """Raise InputError where libraries would end the process as they load, with words of their own."""
    left = address_space_left()
    if left is not None and left < BYTES_TO_START:
        raise InputError(
            f"mlxmoe needs {BYTES_TO_START / 1e6:.0f} MB of memory to start, and this process may take "
            f"{max(left, 0) / 1e6:.0f} MB more (ulimit -v); raise that limit"
        )


def address_space_left() -> int | None:
    """Bytes that this process may still map; None where there is no limit, or no system that enforces one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not sizes.exists():
        return None
    return limit - int(sizes.read_text().split()[0]) * resource.getpagesize()
