"""Errors of the tokenizers library as one line, without Rust's own output.

A Rust panic is not an Exception, and prints a stack trace on standard error before it can be caught.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator

from mlx_moe.errors import InputError, one_line


@contextlib.contextmanager
def panics_reported(doing: str, remedy: str) -> Iterator[None]:
    """Convert whatever the library raises to an InputError: "cannot DOING: ...; REMEDY"."""
    _stderr.hold()
    is_panic = False
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if is_panic or isinstance(error, Exception):
            raise InputError(f"cannot {doing}: {one_line(error)}; {remedy}") from None
        raise
    finally:
        _stderr.let_go(is_panic)


class _HeldStderr:
    """Standard error, held back while the library works; afterwards it is written out, unless there was a panic.

    All threads share the stream, so it is held for all of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._panicked = False
        self._kept: int | None = None  # an unnamed file
        self._stderr: int | None = None  # the original descriptor, while it is redirected

    def hold(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            with contextlib.suppress(OSError):  # without a standard error, or space for its text, do not redirect
                if self._kept is None:
                    self._kept = _nameless_file()
                self._stderr = os.dup(2)
                os.dup2(self._kept, 2)

    def let_go(self, panicked: bool) -> None:
        with self._lock:
            self._holders -= 1
            self._panicked = self._panicked or panicked
            if self._holders or self._stderr is None or self._kept is None:
                return
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
            self._stderr = None
            if n_bytes := os.fstat(self._kept).st_size:
                text = os.pread(self._kept, n_bytes, 0)
                os.ftruncate(self._kept, 0)
                if not self._panicked:
                    with contextlib.suppress(OSError):
                        os.write(2, text)
            self._panicked = False


def _nameless_file() -> int:
    """Return a file that is only appended to: Linux does not lock the position of one in memory between threads."""
    if hasattr(os, "memfd_create"):
        kept = os.memfd_create("stderr")
    else:
        with tempfile.TemporaryFile() as file:
            kept = os.dup(file.fileno())
    fcntl.fcntl(kept, fcntl.F_SETFL, fcntl.fcntl(kept, fcntl.F_GETFL) | os.O_APPEND)
    return kept


_stderr = _HeldStderr()
