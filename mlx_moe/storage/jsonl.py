"""Append-only files of JSON rows; lines torn by a kill or a full disk are skipped."""

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
    """Append one row; it has reached the file system on return. A torn last line is closed first."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("ab") as stream:
        if stream.tell() and not _ends_in_newline(path):
            line = b"\n" + line
        stream.write(line)


def read(path: Path, kind: Any | None = None, warn: Callable[[str], None] | None = None) -> list[Row]:
    """Return a file's rows that match `kind` (a pydantic model); none if there is no file.

    An unterminated last line, which a kill leaves, is skipped silently. All other invalid lines are skipped and
    reported in one call of `warn`. Raises InputError if the file cannot be read at all.
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
        warn(f"{path}: {len(bad)} of {len(lines) - 1} lines are invalid and were left out; the first: {bad[0]}")
    return rows


def truncate_after(path: Path, phase: int, step: int, kind: Any | None = None) -> None:
    """Drop the rows after a resumed step, so that nothing is logged twice, and all invalid lines."""
    keep(
        path,
        lambda row: isinstance(row.get("phase"), int) and (row["phase"], row.get("step") or 0) <= (phase, step),
        kind,
    )


def keep(path: Path, is_kept: Callable[[Row], bool], kind: Any | None = None) -> None:
    """Keep only the rows that `is_kept` accepts; drop invalid lines."""
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
