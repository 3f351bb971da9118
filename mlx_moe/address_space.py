"""How much memory the system lets this process have (`ulimit -v`)."""

from __future__ import annotations

import resource
from pathlib import Path

from mlx_moe.errors import InputError

BYTES_TO_START = 250_000_000  # NumPy's products end the process below 160 MB on two cores


def check_room_to_start() -> None:
    """Raise InputError where libraries would end the process as they load, with words of their own."""
    left = bytes_left()
    if left is not None and left < BYTES_TO_START:
        raise InputError(
            f"mlxmoe needs {BYTES_TO_START / 1e6:.0f} MB of memory to start, and this process may take "
            f"{max(left, 0) / 1e6:.0f} MB more (ulimit -v); raise that limit"
        )


def bytes_left() -> int | None:
    """Bytes that this process may still map; None where there is no limit, or no system that enforces one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not sizes.exists():
        return None
    return limit - int(sizes.read_text().split()[0]) * resource.getpagesize()
