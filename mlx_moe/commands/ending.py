"""How a command ends before its time: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

from mlx_moe.terminal import echo


def stop(message: str, exit_code: int) -> NoReturn:
    echo(f"error: {message}" if exit_code < 128 else message, err=True)
    sys.exit(exit_code)
