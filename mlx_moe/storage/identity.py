"""Facts of a run's start that its config does not contain: backend, device, threads, last phase (`run.json`).

Resuming reads them, so that it reproduces the same numbers. `differences` reports what has changed nevertheless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_moe.errors import InputError, quoted
from mlx_moe.storage.records import Open, PhaseNumber, read_record
from mlx_moe.validation import by_path

IDENTITY = "run.json"


class RunIdentity(Open):
    """Facts recorded when a run began.

    `threads`: of matrix products on CPU, None if the backend does not count them; `versions`: of the libraries that
    compute; `config`: as first written, without the data, whose hashes are in `data.json`; `differences`: changes since
    the start, a few words each; `instructions`: instruction set of matrix products on CPU; `start_sha256`: hash of the
    weights that the run starts from.
    """

    backend: Literal["mlx", "torch"]
    device: Literal["cpu", "gpu"]
    device_label: str
    precision: str
    threads: Annotated[int, Field(ge=1, le=2**16)] | None
    processes: Annotated[int, Field(ge=1, le=2**20)]
    machine: str
    versions: dict[str, str]
    last_phase: PhaseNumber
    allow_lossy: bool = False
    config: dict[str, Any] = Field(default_factory=dict)
    differences: list[str] = Field(default_factory=list)
    instructions: str | None = None
    start_sha256: str | None = None


def read_identity(run: Path) -> RunIdentity | None:
    """Return a run's identity; None if it predates this file. Raises InputError if it is damaged."""
    file = run / IDENTITY
    return read_record(RunIdentity, file) if file.is_file() else None


def is_identity(path: Path) -> bool:
    """Return whether a file is a run's identity, the only file left by a run killed at its start."""
    if path.name != IDENTITY or path.is_symlink():
        return False
    try:
        return read_identity(path.parent) is not None
    except InputError:
        return False


def differences(before: RunIdentity, now: RunIdentity) -> list[str]:
    """List what makes a resumed run round differently from the original, a few words each."""
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
    """List the config settings changed since the run began, a few words each."""
    was, is_now = by_path(before.config), by_path(now.config)
    changed = [
        f"{key} {quoted(is_now[key])}, was {quoted(was[key])}"
        for key in was
        if key in is_now and was[key] != is_now[key]
    ]
    phases, phases_before = (list(identity.config.get("phases", {})) for identity in (now, before))
    if phases != phases_before:
        to_add = f" (trained to phase {now.last_phase}; --phases {len(phases)} trains all)"
        more = to_add if len(phases) > now.last_phase else ""
        changed.insert(0, f"phases {', '.join(phases)}, was {', '.join(phases_before)}{more}")
    return changed
