"""Terminal output that cannot steer a terminal and never fails, and checks of the process's folders."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from mlx_moe.errors import InputError, is_out_of_memory, one_line, unbroken

DELETED = "the working folder was deleted; go to another one"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # user settings of the thread count
LONGEST_CELL = 1000  # characters of Markdown
KEPT = "\n\t"
# Bidirectional controls: with them, a name could display as another.
TURNING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
LINE_SEPARATORS = {"\u2028", "\u2029"}


def printable(text: str) -> str:
    """Escape a text's control characters, so that it cannot move the cursor, colour, or hide anything."""
    if text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _written_out(character) for character in text)


def plain_markdown(text: str) -> str:
    """Return the text as one literal line of Markdown: no markup, links or mentions, and bounded in length."""
    import html  # slow to load, and hardly ever needed

    line = " ".join(printable(text).split())
    line = line if len(line) <= LONGEST_CELL else f"{line[: LONGEST_CELL - 1]}…"
    marked = re.sub(r"([\\`*_\[\]!|~#])", r"\\\1", html.escape(line, quote=False))
    return marked.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print a text, made printable, to standard output, or to standard error if `err`."""
    stream = sys.stderr if err else sys.stdout
    stream.write(printable(str(text)) + ("\n" if nl else ""))
    stream.flush()


def prepare_streams() -> None:
    """Make standard output and error streams whose writes never fail.

    Characters outside the encoding are escaped. If the reader is gone or a log's disk is full, further output is
    dropped and the work continues.
    """
    for name in THREADS:  # libraries each complain about values that are not numbers
        if name in os.environ and not re.fullmatch("0*[1-9][0-9]{0,3}(,.*)?", os.environ[name]):
            del os.environ[name]
    for name in ("COLUMNS", "LINES"):  # rich accepts any digits, and pads each line to that width
        if len(text := os.environ.get(name, "")) > 4 or not text.isascii():
            del os.environ[name]
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Unfailing(stream))


def check_folders() -> None:
    """Unset TMPDIR if it is not a folder: Python ignores it then, MLX does not.

    Raises InputError if the working folder was deleted, where libraries abort the process.
    """
    try:
        os.getcwd()
    except OSError:
        raise InputError(DELETED) from None
    if not os.path.isdir(os.environ.get("TMPDIR", "/")):
        del os.environ["TMPDIR"]


def has_reader() -> bool:
    """Return False once a write to standard output has failed, as when the reader of a pipe has ended."""
    return not getattr(sys.stdout, "is_lost", False)


class _Unfailing:
    """A text stream whose writes never raise."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.is_lost = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # a ValueError if it is closed
            self._give_up()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Redirect the stream and its buffered text to the null device."""
        self.is_lost = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def describe_crash(error: BaseException) -> tuple[str, int]:
    """Return one line for an unexpected error, and the exit code.

    Errors of the file system count as bad input (2), without a traceback. All others exit with 1 and have their
    traceback in a file that the line names.
    """
    if is_out_of_memory(error):
        return (
            f"out of memory{_said(error)}; take a smaller model, batch (training.batch_size) or context, or a machine "
            "with more; mlxmoe plan says what a run needs",
            1,
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f" {unbroken(str(error.filename))}" if error.filename else ""
        return f"cannot use{where}: {error.strerror or one_line(error)}", 2
    try:
        kept = f"; the traceback is in {_keep_traceback(error)}"
    except (OSError, MemoryError):
        kept = ""
    return f"unexpected {type(error).__name__}: {one_line(error)}{kept}; please report it", 1


def _said(error: BaseException) -> str:
    return f": {one_line(error)}" if str(error) else ""


def _keep_traceback(error: BaseException) -> Path:
    import tempfile  # slow to load, and hardly ever needed
    import traceback

    descriptor, name = tempfile.mkstemp(prefix="mlxmoe-error-", suffix=".txt")
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(" ".join(sys.argv) + "\n\n")
        traceback.print_exception(error, file=stream)
    return Path(name)


def _is_harmless(character: str) -> bool:
    import unicodedata

    if character in KEPT:
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in TURNING | LINE_SEPARATORS


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
