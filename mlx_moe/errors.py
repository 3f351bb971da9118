"""What a user can get wrong."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

MAX_QUOTED = 80  # characters of a value that a message quotes


class InputError(ValueError):
    """Bad input. The message is one line that names the value, the limit and the way out; exit code 2."""


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """What another library said, for the one line of an InputError: at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def quoted(value: Any) -> str:
    """What a user gave, for the one line of an InputError: its repr, cut where it is long or nested."""
    shortened = _REPR.repr(value)
    return shortened if len(shortened) <= MAX_QUOTED else f"{shortened[: MAX_QUOTED - 1]}…"


_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, MAX_QUOTED, MAX_QUOTED, 40
