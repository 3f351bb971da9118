"""Errors that a user can cause, and helpers for one-line messages."""

from __future__ import annotations

import re
from reprlib import Repr
from typing import Any

MAX_QUOTED = 80  # characters of a value that a message quotes
# Characters at which str.splitlines splits, with their escapes.
LINE_ENDS = {ord(end): repr(end)[1:-1] for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


class Error(Exception):
    """Base class of all errors that mlxmoe raises on purpose."""


class InputError(Error, ValueError):
    """Bad input: one line per fault, with the value, the limit and what to do. Exit code 2.

    Line breaks within a line, as in a file's name, are escaped.
    """

    def __init__(self, *lines: str):
        super().__init__(*map(unbroken, lines))

    @property
    def lines(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.lines)


def unbroken(text: str) -> str:
    """Return the text on one line, with line breaks escaped."""
    return text.translate(LINE_ENDS)


OUT_OF_MEMORY = (
    r"out of memory|insufficient memory|not enough memory|can't allocate|cannot allocate|unable to allocate|bad_alloc"
    r"|attempting to allocate|failed to allocate|failed to map segment"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory ran out, as worded by Python, PyTorch, MLX or NumPy."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ValueError | OSError | ImportError)
        and bool(re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE))
    )


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """Return another library's message for the one line of an InputError, cut at `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def quoted(value: Any) -> str:
    """Return the repr of a user's value for the one line of an InputError, cut if it is long or nested."""
    shortened = _REPR.repr(value)
    return shortened if len(shortened) <= MAX_QUOTED else f"{shortened[: MAX_QUOTED - 1]}…"


def brief_name(name: str, limit: int = 100) -> str:
    """Return a name from outside without quotes, its control characters escaped."""
    text = repr(name)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, MAX_QUOTED, MAX_QUOTED, 40
