"""Resume a run as it was begun: its backend, device, threads, last phase, unless others are asked for."""

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

MOST_THREADS = 256  # that a run gets back on a machine of fewer cores


@dataclass(frozen=True)
class Resumed:
    """A run to resume."""

    run: RunConfig
    backend: Backend
    last_phase: int
    device: str = "auto"
    allow_lossy: bool = False
    threads: int | None = None  # of products on the CPU


def resume_run(path: Path, backend: str, device: str, has_phases: bool) -> Resumed:
    """Read what goes on in a run's folder. `auto` stands for what it was begun with; `has_phases`: the user names them.

    The number of threads is as it was, unless the environment says another. Raises InputError where there is no
    run, where its files are damaged, or where what it was begun with is not to be had here.
    """
    before = None
    if launcher() is None:  # under one, only the first process may see the folder
        if not path.is_dir():
            raise InputError(f"cannot resume {path}: there is no such folder")
        before = read_identity(path)
    chosen = choose_backend(before.backend if before and backend == "auto" else backend)
    folder = RunFolder(path, chosen.connect())
    run, identity = folder.open(), folder.identity()
    if identity is None:
        if backend == "auto" or not has_phases:
            raise InputError(
                f"cannot resume {path}: {IDENTITY} is missing, and with it what the run was begun with; put back a "
                "copy, or say it: --backend torch --phases 2"
            )
        return Resumed(run, chosen, run.last_phase, device)
    same_backend = chosen.name == identity.backend
    has_own_threads = not same_backend or any(name in os.environ for name in THREADS)
    place = identity.device if same_backend and device == "auto" else device
    too_many = (identity.threads or 0) > max(MOST_THREADS, os.cpu_count() or 1)  # the system may refuse them
    threads = None if has_own_threads or too_many else identity.threads
    return Resumed(run, chosen, identity.last_phase, place, identity.allow_lossy, threads)
