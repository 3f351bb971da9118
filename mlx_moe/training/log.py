"""Rows of JSON in a file, and what a run's environment is."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_moe.training.backend import Backend, Trainer
from mlx_moe.training.files import replacing

LIBRARIES = ("mlxmoe", "mlx", "mlx-lm", "torch", "numpy", "tokenizers", "safetensors", "datasets", "transformers")


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSONL file; it is on the file system when this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file. A last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind(path: Path, phase: int, step: int) -> None:
    """Drop the rows after a resumed step, so that nothing is logged twice."""
    if path.exists():
        kept = [row for row in read(path) if (row["phase"], row.get("step", 0)) <= (phase, step)]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def environment(backend: Backend, trainer: Trainer) -> dict[str, Any]:
    """The command, the code's git SHA, versions, backend and device."""
    return {
        "command": sys.argv,
        "git_sha": _git_sha(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "device": trainer.device,
        "precision": trainer.precision.name,
        "processes": trainer.world.size,
    }


def _git_sha() -> str | None:
    source = Path(__file__).parent
    try:
        result = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
