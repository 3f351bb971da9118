"""Resuming of a run with its original backend, device, threads and last phase, unless the user names others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.storage.identity import IDENTITY, read_identity
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.terminal import THREADS
from mlx_moe.training.backend import Backend, choose_backend, launcher

MOST_THREADS = 256  # maximum restored on a machine with fewer cores


@dataclass(frozen=True)
class Resumed:
    """A run to resume."""

    run: RunConfig
    backend: Backend
    last_phase: int
    device: str = "auto"
    allow_lossy: bool = False
    threads: int | None = None  # of matrix products on CPU


def resume_run(path: Path, backend: str, device: str, has_phases: bool) -> Resumed:
    """Read the run in a folder. `auto` keeps the original setting; `has_phases`: the user names the phases.

    The number of threads is kept, unless the environment sets it. Raises InputError if there is no run, if its files
    are damaged, or if its original setting is unavailable here.
    """
    before = None
    if launcher() is None:  # under a launcher, only rank 0 may see the folder
        if not path.is_dir():
            raise InputError(f"cannot resume {path}: there is no such folder")
        before = read_identity(path)
    chosen = choose_backend(before.backend if before and backend == "auto" else backend)
    folder = RunFolder(path, chosen.connect())
    run, identity = folder.open(), folder.identity()
    if identity is None:
        if backend == "auto" or not has_phases:
            raise InputError(
                f"cannot resume {path}: {IDENTITY} is missing, so the run's backend and phases are unknown; "
                "restore a copy, or name them: --backend torch --phases 2"
            )
        return Resumed(run, chosen, run.last_phase, device)
    same_backend = chosen.name == identity.backend
    has_own_threads = not same_backend or any(name in os.environ for name in THREADS)
    place = identity.device if same_backend and device == "auto" else device
    too_many = (identity.threads or 0) > max(MOST_THREADS, os.cpu_count() or 1)  # the system may refuse to start them
    threads = None if has_own_threads or too_many else identity.threads
    last_phase = min(identity.last_phase, len(run.phases))  # the config may have lost phases since
    return Resumed(run, chosen, last_phase, place, identity.allow_lossy, threads)
