"""What a run's folder says, read once for plots and the report: whatever is there of a run, at whatever point it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_moe.accounting import ParameterCount, count_parameters
from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.errors import InputError
from mlx_moe.storage import jsonl
from mlx_moe.storage.reading import read_mapping
from mlx_moe.storage.run_folder import CONFIG, DATA, ENVIRONMENT, HISTORY, METRICS, read_run
from mlx_moe.training.boundary import phase_config, phase_model
from mlx_moe.training.loop import TITLES
from mlx_moe.training.results import PhaseResult, phase_result

Row = dict[str, Any]
EXPERTS = "experts.json"


@dataclass(frozen=True)
class PhaseRecord:
    """A phase that has begun.

    `rows` are those of `metrics.jsonl`, each with where it stands in the run as a whole: `run_step` (steps),
    `run_tokens` and `run_seconds` (of steps; validation and saving left out).
    """

    number: int
    model: ModelConfig
    planned_steps: int
    rows: list[Row]
    event: Row | None  # its row of `history.jsonl`; None until it is finished

    @property
    def name(self) -> str:
        kind = "larger experts" if self.number == 3 else "experts" if self.model.moe else "dense"
        return f"{self.number}: {kind}"

    @property
    def steps(self) -> int:
        """Those that are logged."""
        last: int = self.rows[-1]["step"]
        return last

    @property
    def parameters(self) -> ParameterCount:
        return count_parameters(self.model)

    @cached_property
    def result(self) -> PhaseResult | None:
        """So far; None before the first step."""
        return phase_result(self.rows, self.number) if self.steps else None

    def column(self, name: str) -> list[tuple[Row, Any]]:
        """The rows that have a value under a name, with it."""
        return [(row, row[name]) for row in self.rows if row.get(name) is not None]


@dataclass(frozen=True)
class Record:
    """A run, as far as it went."""

    path: Path
    run: RunConfig
    phases: list[PhaseRecord]
    boundaries: dict[str, Row]  # `1-2`, `2-3`: the certificates, passed or not
    environment: Row
    data: Row
    experts: Row | None  # what `mlxmoe experts` wrote

    @property
    def starts(self) -> dict[int, int]:
        """The steps of the run at which its phases begin."""
        return {phase.number: phase.rows[0]["run_step"] - phase.rows[0]["step"] for phase in self.phases}

    @property
    def missing(self) -> list[str]:
        """What a whole run of three phases would have and this one has not, each in a few words."""
        begun = {phase.number: phase for phase in self.phases}
        missing = [
            f"phase {number} was not begun"
            if number not in begun
            else f"phase {number} stopped at step {begun[number].steps} of {begun[number].planned_steps}"
            for number in (self.run.start.phases if self.run.start else TITLES)
            if number not in begun or begun[number].event is None
        ]
        missing += [f"no {name}" for name, there in ((ENVIRONMENT, self.environment), (DATA, self.data)) if not there]
        if self.experts is None and any(phase.model.moe for phase in self.phases):
            missing.append(f"no {EXPERTS} (mlxmoe experts {self.path} writes it)")
        return missing


def read_record(path: Path) -> Record:
    """Read a run's folder. Raises InputError where it is none, or where a file of it cannot be read."""
    run = read_config(path)
    rows, history = _rows(path / METRICS), _rows(path / HISTORY)
    events = {row["phase"]: row for row in history if row["event"] == "phase"}
    phases: list[PhaseRecord] = []
    for number in TITLES:
        own = [row for row in rows if row["phase"] == number]
        if own:
            before = phases[-1].rows[-1] if phases else {}
            model, planned = phase_model(run, number), phase_config(run, number).steps
            phases.append(PhaseRecord(number, model, planned, _in_the_run(own, before), events.get(number)))
    if not phases:
        raise InputError(f"{path} has no rows in {METRICS} yet; wait for the first, or go on with it: --resume {path}")
    boundaries = {file.stem: _json(file) for file in sorted((path / "boundaries").glob("*.json"))}
    experts = _json(path / EXPERTS) or None
    return Record(path, run, phases, boundaries, _json(path / ENVIRONMENT), _json(path / DATA), experts)


def read_config(path: Path) -> RunConfig:
    """The config of a run. Raises InputError where there is none."""
    if not (path / CONFIG).is_file():
        raise InputError(f"no run at {path}: there is no {CONFIG} in it; name a folder that mlxmoe train wrote")
    return read_run(path, read_mapping(path / CONFIG))


def _in_the_run(rows: list[Row], before: Row) -> list[Row]:
    """The rows of a phase with their places in the run, given the last row of the phase before."""
    step, tokens = before.get("run_step", 0), before.get("run_tokens", 0)
    seconds, last_step = before.get("run_seconds", 0.0), 0
    placed = []
    for row in rows:
        seconds += row.get("step_ms", 0) * (row["step"] - last_step) / 1e3
        last_step = row["step"]
        place = {"run_step": step + row["step"], "run_tokens": tokens + row.get("tokens", 0), "run_seconds": seconds}
        placed.append(row | place)
    return placed


def _rows(file: Path) -> list[Row]:
    bad: list[str] = []
    rows = jsonl.read(file, warn=bad.append)
    if bad and not rows:
        raise InputError(f"cannot read {bad[0]}")
    return rows


def _json(file: Path) -> Row:
    """A file's values; none where there is no file."""
    try:
        values: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    return values
