"""Experiment trackers that receive the rows of `metrics.jsonl`: trackio (local) and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError, one_line
from mlx_moe.extras import how_to_install
from mlx_moe.storage.atomic import replacing

PROJECT = "mlxmoe"
FILE = "tracker.json"
LOGIN_TIMEOUT_S = 30  # for an unanswered login prompt


class Service(Protocol):
    """An open run of a tracker; trackio's and wandb's objects match it."""

    def log(self, row: dict[str, Any], *, step: int) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Tracker:
    """Sender of each row, once. After a failure it warns once and stops: a tracker never stops training."""

    name: str
    service: Service
    first_steps: dict[int, int]  # first step of each phase, in a tracker's count over all phases
    sent: tuple[int, int]  # phase and step of the last row
    warn: Callable[[str], None]
    failed: bool = False

    def log(self, row: dict[str, Any]) -> None:
        position = row["phase"], row["step"]
        if position > self.sent:
            self.sent = position
            step = self.first_steps[row["phase"]] + row["step"]
            # trackers reserve the name `step`
            values = {"phase_step" if name == "step" else name: value for name, value in _scalars(row)}
            self._try(lambda: self.service.log(values, step=step))

    def finish(self) -> None:
        self._try(self.service.finish)

    def _try(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            self.warn(_gave_up(self.name, error))


def check_installed(name: str) -> None:
    """Raise InputError if the config's tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise InputError(f"training.tracker {name}: it is not installed; {how_to_install(name)}, or take none")


def open_tracker(
    run: RunConfig, directory: Path, rows: list[dict[str, Any]], warn: Callable[[str], None]
) -> Tracker | None:
    """Open the config's tracker; a resumed run continues in it.

    `rows` are those of `metrics.jsonl` at the start, which the tracker has already. Returns None, with a warning, if it
    fails.
    """
    name = run.training.tracker
    if name == "none":
        return None
    try:
        service = START[name](_identity(directory, name), directory, run.model_dump(mode="json"))
    except Exception as error:
        warn(_gave_up(name, error))
        return None
    steps = [phase.steps + 1 for phase in run.phases.values()]  # + 1 because each phase has a row at step 0
    first_steps = dict(enumerate(accumulate(steps, initial=0), start=1))
    return Tracker(name, service, first_steps, max(((row["phase"], row["step"]) for row in rows), default=(0, 0)), warn)


def _start_trackio(identity: str, directory: Path, config: dict[str, Any]) -> Service:
    trackio = importlib.import_module("trackio")
    service: Service = trackio.init(project=PROJECT, name=identity, resume="allow", config=config, embed=False)
    return service


def _start_wandb(identity: str, directory: Path, config: dict[str, Any]) -> Service:
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(silent=True, console="off", login_timeout=LOGIN_TIMEOUT_S)
    service: Service = wandb.init(
        project=PROJECT, id=identity, name=identity, resume="allow", dir=directory, config=config, settings=settings
    )
    return service


START: dict[str, Callable[[str, Path, dict[str, Any]], Service]] = {"trackio": _start_trackio, "wandb": _start_wandb}


def _identity(directory: Path, name: str) -> str:
    """Return the tracker's name for the run, which stays the same on resuming."""
    file = directory / FILE
    identities: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in identities:
        run = re.sub(r"[^\w-]", "-", directory.resolve().name)
        identities[name] = f"{run}-{secrets.token_hex(4)}"
        with replacing(file) as partial:
            partial.write_text(json.dumps(identities, indent=2) + "\n", encoding="utf-8")
    return identities[name]


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten the row for trackers: `expert_load/0/3` is expert 3 of the first layer with experts."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from _scalars({f"{name}/{i}": part for i, part in enumerate(value)})
        else:
            yield name, value


def _gave_up(name: str, error: Exception) -> str:
    return f"{name} failed and gets no more rows ({one_line(error)}); training continues, and all is in metrics.jsonl"
