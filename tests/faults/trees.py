"""What stands in a folder, and in what two folders differ."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

# Keys of JSON and columns of CSV that say when or how fast: two runs that did the same differ in them.
TIMES = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds", "tflops", "peak_tflops", "when", "time"}
# Files that only tell how it went.
TOLD = {"environment.json"}
LOGS = "logs"
LEFTOVER = ".mlxmoe-"


def snapshot(folder: Path) -> dict[str, str]:
    """All that stands under a folder, by relative path: its kind, and a digest of a file or the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            content = f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
        elif stat.S_ISLNK(mode):
            content = f"link to {os.readlink(path)}"
        else:
            content = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}[stat.S_IFMT(mode)]
        found[str(path.relative_to(folder))] = content
    return found


def lost(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was there before and is not there, or not the same, after."""
    return [
        f"{name}: {content}, then {after.get(name, 'nothing')}"
        for name, content in before.items()
        if after.get(name) != content
    ]


def added(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(after.keys() - before.keys())


def leftovers(folder: Path) -> list[str]:
    """Scratch folders and lock files that are still there."""
    return [str(path.relative_to(folder)) for path in folder.rglob(f"{LEFTOVER}*")]


def differences(one: Path, other: Path) -> list[str]:
    """In what two files or folders differ, but for times."""
    names = [_files(place) for place in (one, other)]
    found = [f"only in one of both: {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if _timeless(one / name) != _timeless(other / name):
            found.append(f"differs: {name or one.name}")
    return found


def _files(place: Path) -> set[str]:
    if place.is_file():
        return {""}
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and path.parent.name != LOGS}


def _timeless(file: Path) -> Any:
    """The content of a file without what differs from time to time."""
    if file.name in TOLD:
        return None
    data = file.read_bytes()
    if file.name == "results.csv":
        rows = csv.DictReader(io.StringIO(data.decode()))
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    if file.suffix == ".json":
        return _untimed(json.loads(data))
    if file.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in data.splitlines()]
    return data


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMES}
    return [_untimed(item) for item in value] if isinstance(value, list) else value
