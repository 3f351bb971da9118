"""Rows of JSON in a file that grows: what a kill or a full disk tears is left out, and all else is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import replacing
from mlx_moe.storage.reading import parse_json, read_bytes
from mlx_moe.validation import validate

LARGEST_LOG = 4 << 30  # bytes
LONGEST_LINE = 64 << 20  # bytes: 256 layers of 4,096 experts are 10 MB
Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Append one row; it is on the file system when this returns. After a torn line it begins a line of its own."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("ab") as stream:
        if stream.tell() and not _ends_in_newline(path):
            line = b"\n" + line
        stream.write(line)


def read(path: Path, kind: Any | None = None, warn: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of a file, but for those that are not of a `kind` (a pydantic model); none where there is no file.

    A last line without its end is left out without a word, because that is what a kill leaves. Every other line that
    is no row is left out and counted in one call of `warn`. Raises InputError where the file cannot be read at all.
    """
    if not os.path.lexists(path):
        return []
    rows: list[Row] = []
    bad: list[str] = []
    lines = read_bytes(path, LARGEST_LOG).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, f"line {number}", kind))
        except InputError as error:
            bad.append(error.lines[0])
    if bad and warn is not None:
        warn(f"{path}: {len(bad)} of {len(lines) - 1} lines are no rows and were left out; the first: {bad[0]}")
    return rows


def rewind(path: Path, phase: int, step: int, kind: Any | None = None) -> None:
    """Drop the rows after a resumed step, so that nothing is logged twice, and the lines that are no rows."""
    keep(
        path,
        lambda row: isinstance(row.get("phase"), int) and (row["phase"], row.get("step") or 0) <= (phase, step),
        kind,
    )


def keep(path: Path, is_kept: Callable[[Row], bool], kind: Any | None = None) -> None:
    """Drop all rows but some, and the lines that are no rows."""
    if os.path.lexists(path):
        kept = [row for row in read(path, kind) if is_kept(row)]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _row(line: bytes, where: str, kind: Any | None) -> Row:
    if len(line) > LONGEST_LINE:
        raise InputError(f"{where} has {len(line):,} bytes")
    try:
        values = parse_json(line.decode("utf-8"), where)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is not a JSON object")
    if kind is not None:
        try:
            validate(kind, values)
        except InputError as error:
            raise InputError(f"{where}: {error.lines[0]}") from None
    return values


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
