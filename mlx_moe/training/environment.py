"""Versions, device and code of a run, as kept in environment.json."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_moe.training.backend import Backend, Trainer

LIBRARIES = ("mlxmoe", "mlx", "mlx-lm", "torch", "numpy", "tokenizers", "safetensors", "datasets", "transformers")


def library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def environment(backend: Backend, trainer: Trainer) -> dict[str, Any]:
    """Return the command, the code's git SHA, library versions, backend and device."""
    return {
        "command": sys.argv,
        "git_sha": _git_sha(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "device": trainer.device.label,
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
