"""What a run was begun with and its config does not say: backend, device, threads, how far it goes (`run.json`).

Resuming takes it from here, so that the same numbers come out. What differs nevertheless is said: `differences`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_moe.errors import InputError, quoted
from mlx_moe.storage.records import Open, Phase, read_record
from mlx_moe.validation import by_path

IDENTITY = "run.json"


class RunIdentity(Open):
    """`threads`: of products on CPU, None where nobody counts them; `versions`: of what computes; `config`: as it was
    written, but for the data, whose hashes stand in `data.json`; `differences`: what has changed since the run began,
    each in a few words; `instructions`: those of products on CPU; `start_sha256`: of the weights that it starts from.
    """

    backend: Literal["mlx", "torch"]
    device: Literal["cpu", "gpu"]
    device_label: str
    precision: str
    threads: Annotated[int, Field(ge=1, le=2**16)] | None
    processes: Annotated[int, Field(ge=1, le=2**20)]
    machine: str
    versions: dict[str, str]
    last_phase: Phase
    allow_lossy: bool = False
    config: dict[str, Any] = Field(default_factory=dict)
    differences: list[str] = Field(default_factory=list)
    instructions: str | None = None
    start_sha256: str | None = None


def read_identity(run: Path) -> RunIdentity | None:
    """The identity of a run; None where it was begun before there were any. Raises InputError where it is damaged."""
    file = run / IDENTITY
    return read_record(RunIdentity, file) if file.is_file() else None


def is_identity(path: Path) -> bool:
    """Whether a file is the identity of a run: all that is there of one that was killed as it began."""
    if path.name != IDENTITY or path.is_symlink():
        return False
    try:
        return read_identity(path.parent) is not None
    except InputError:
        return False


def differences(before: RunIdentity, now: RunIdentity) -> list[str]:
    """What makes a resumed run round differently from the run that was begun, each in a few words."""
    named = {"backend": "backend", "device_label": "device", "precision": "precision", "machine": "machine"}
    found = [
        f"{name} {getattr(now, key)}, was {getattr(before, key)}"
        for key, name in named.items()
        if getattr(now, key) != getattr(before, key)
    ]
    for name in ("threads", "instructions", "processes"):
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now and None not in (was, is_now) and before.backend == now.backend:
            found.append(f"{name} {is_now}, was {was}")
    for library, version in now.versions.items():
        if before.versions.get(library, version) != version:
            found.append(f"{library} {version}, was {before.versions[library]}")
    return found


def changed_settings(before: RunIdentity, now: RunIdentity) -> list[str]:
    """List the settings of a run's config that were changed since the run began, each in a few words."""
    was, is_now = by_path(before.config), by_path(now.config)
    return [
        f"{key} {quoted(is_now[key])}, was {quoted(was[key])}"
        for key in was
        if key in is_now and was[key] != is_now[key]
    ]
