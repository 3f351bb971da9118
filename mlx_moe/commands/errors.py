"""Early end of a command: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

from mlx_moe.terminal import echo

MAX_MESSAGE = 1_000  # characters; messages may quote long input, and the remedy comes last


def stop(message: str, exit_code: int) -> NoReturn:
    """Print a message, with the middle of overlong lines cut out, and exit with the code."""
    message = "\n".join(_readable(line) for line in message.split("\n"))
    echo(f"error: {message}" if exit_code < 128 else message, err=True)
    sys.exit(exit_code)


def _readable(line: str) -> str:
    if len(line) <= MAX_MESSAGE:
        return line
    return f"{line[: MAX_MESSAGE * 2 // 3]} … {line[-MAX_MESSAGE // 4 :]}"
