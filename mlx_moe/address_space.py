"""Address space left to this process (`ulimit -v`)."""

from __future__ import annotations

import resource
from pathlib import Path

from mlx_moe.errors import InputError

BYTES_TO_START = 250_000_000  # below 160 MB, NumPy's matrix products abort the process (two cores)


def check_room_to_start() -> None:
    """Raise InputError if too little memory is left to load the libraries, which would abort by themselves."""
    left = bytes_left()
    if left is not None and left < BYTES_TO_START:
        raise InputError(
            f"mlxmoe needs {BYTES_TO_START / 1e6:.0f} MB of memory to start, and this process may take "
            f"{max(left, 0) / 1e6:.0f} MB more (ulimit -v); raise that limit"
        )


def bytes_left() -> int | None:
    """Return the bytes that this process may still map; None without a limit, or where none is enforced."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not sizes.exists():
        return None
    return limit - int(sizes.read_text().split()[0]) * resource.getpagesize()
