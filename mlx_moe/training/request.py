"""Options of `mlxmoe train`, resolved to a run, its folder and its backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model
from mlx_moe.hub.resolve import find_model
from mlx_moe.presets import as_overrides, load_run
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.run_folder import check_new
from mlx_moe.training.backend import Backend, choose_backend
from mlx_moe.training.from_checkpoint import start_from
from mlx_moe.training.resume import resume_run


@dataclass(frozen=True)
class RunRequest:
    """The options of `mlxmoe train`, under the same names; None means not given.

    `phases` are numbers as on the command line, `3` or `2,3`; `source` is the model to start from; `overrides` are
    `key.path=value`.
    """

    preset: str | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    phases: str | None = None
    source: str | None = None
    data: str | None = None
    tokenizer: str | None = None
    steps: int | None = None
    seed: int | None = None
    optimizer_transfer: str | None = None
    backend: str = "auto"
    device: str = "auto"
    out: Path | None = None
    resume: Path | None = None
    allow_lossy: bool = False

    def given_beside_resume(self) -> list[str]:
        """Return the given options that contradict `--resume`, which keeps the run's settings."""
        options: dict[str, object] = {"--preset": self.preset, "--config": self.config, "-o": self.overrides or None}
        options |= {"--from": self.source, "--out": self.out, "--data": self.data, "--tokenizer": self.tokenizer}
        options |= {"--steps": self.steps, "--seed": self.seed, "--optimizer-transfer": self.optimizer_transfer}
        return [option for option, value in options.items() if value is not None]


@dataclass(frozen=True)
class Options:
    """Options of this call that are not part of the run."""

    device: str = "auto"
    allow_lossy: bool = False
    is_new: bool = False  # the folder must not contain a run yet
    threads: int | None = None  # of matrix products on CPU; None: the backend's default
    open_model: Callable[[Path], Checkpoint] = field(default=open_model)  # opens the model that a run starts from
    saves_start: bool = False  # save the starting model as step 0 of the first phase


@dataclass(frozen=True)
class Resolved:
    """A run to begin or to resume, up to phase number `last_phase`."""

    run: RunConfig
    folder: Path
    backend: Backend
    last_phase: int
    options: Options


def resolve(request: RunRequest) -> Resolved:
    """Resolve a request. Raises InputError if its options contradict each other, or the folder is in use."""
    named = None if request.phases is None else parse_phases(request.phases)
    return _new(request, named) if request.resume is None else _resumed(request, request.resume, named)


def _resumed(request: RunRequest, path: Path, named: list[int] | None) -> Resolved:
    if given := request.given_beside_resume():
        raise InputError(f"--resume takes the run as it is; leave out {', '.join(given)}")
    absolute(path)
    folder = path.expanduser()
    found = resume_run(folder, request.backend, request.device, named is not None)
    options = Options(found.device, request.allow_lossy or found.allow_lossy, threads=found.threads)
    last_phase = _last_phase(named, found.run, "") if named else found.last_phase
    return Resolved(found.run, folder, found.backend, last_phase, options)


def _new(request: RunRequest, named: list[int] | None) -> Resolved:
    backend = choose_backend(request.backend)
    run = _load(request, named)
    folder = request.out or Path("runs") / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    absolute(folder)
    folder = folder.expanduser()
    check_new(folder)
    if request.out is None and backend.connect().size > 1:
        raise InputError(f"{backend.connect().size} processes need one folder between them; name it with --out")
    last_phase = _last_phase(named, run, ", or name a model to start from: --from MODEL")
    return Resolved(run, folder, backend, last_phase, Options(request.device, request.allow_lossy, is_new=True))


def _load(request: RunRequest, named: list[int] | None) -> RunConfig:
    shortcuts = {"data.source": request.data, "data.tokenizer": request.tokenizer, "seed": request.seed}
    shortcuts |= {"optimizer.transfer": request.optimizer_transfer}
    given = as_overrides({key: value for key, value in shortcuts.items() if value is not None})
    preset = "three-phase" if request.preset is None else request.preset
    layers = preset, request.config, [*given, *request.overrides]
    if request.source is None:
        return load_run(*layers, steps=request.steps)
    if named is None:
        listed = list_phases(load_run(*layers))
        raise InputError(
            f"--from {request.source}: name the phases to run, such as --phases 2 or --phases 2,3, out of {listed}"
        )
    return start_from(open_model(find_model(request.source)), named, *layers, steps=request.steps)


def parse_phases(text: str) -> list[int]:
    """Parse phase numbers: `3`, or consecutive ones such as `2,3`. Raises InputError."""
    phases = [int(number) for number in text.split(",") if re.fullmatch(r"[1-9][0-9]?", number)]
    if len(phases) != len(text.split(",")) or phases != list(range(phases[0], phases[-1] + 1)):
        raise InputError(f"--phases {text}: must be the number of a phase, from 1, or some in a row, such as 2,3")
    return phases


def list_phases(run: RunConfig) -> str:
    """List the phases of a run: `1 dense, 2 moe (upcycle)`."""
    transfers = [f" ({config.transfer})" if config.transfer else "" for config in run.phases.values()]
    names = zip(run.phases, transfers, strict=True)
    return ", ".join(f"{number} {name}{transfer}" for number, (name, transfer) in enumerate(names, start=1))


def _last_phase(named: list[int] | None, run: RunConfig, alternative: str) -> int:
    """Return the number of the last phase to train; a single number means all phases up to it."""
    if named is None:
        return run.last_phase
    words = ",".join(map(str, named))
    if named[-1] > len(run.phases):
        raise InputError(f"--phases {words}: there is no phase {named[-1]}; the run has {list_phases(run)}")
    if named[-1] < run.first_phase or (len(named) > 1 and named[0] != run.first_phase):
        raise InputError(
            f"--phases {words}: the run begins with phase {run.first_phase}; take --phases "
            f"{max(named[-1], run.first_phase)}{alternative}"
        )
    return named[-1]
