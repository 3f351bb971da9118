"""Reader of a run's folder for plots and the report, whatever state the run is in."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlx_moe.accounting import ParameterCount, count_parameters
from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.errors import InputError, one_line
from mlx_moe.phases import Phase, get_phase, phase_numbers, start_phase
from mlx_moe.storage import jsonl, records
from mlx_moe.storage.identity import read_identity
from mlx_moe.storage.jsonl import Row
from mlx_moe.storage.reading import LARGEST_CONFIG, read_mapping
from mlx_moe.storage.run_folder import CONFIG, DATA, ENVIRONMENT, HISTORY, METRICS, read_run, resume_command

EXPERTS_FILE = "experts.json"
MAX_REASON = 300  # characters of a message about a file


@dataclass(frozen=True)
class PhaseRecord:
    """A phase that has begun.

    `rows` are those of `metrics.jsonl`, by ascending step, with their position in the whole run: `run_step` (steps),
    `run_tokens` and `run_seconds` (of steps, without validation and saving). Keys without a value are absent, and all
    numbers are finite.
    """

    phase: Phase
    rows: list[Row]
    event: Row | None  # its row of `history.jsonl`; None until it is finished
    diverged: Row | None = None  # the row with the `step` and `reason` of a divergence

    @property
    def number(self) -> int:
        return self.phase.number

    @property
    def model(self) -> ModelConfig:
        return self.phase.model

    @property
    def planned_steps(self) -> int:
        return self.phase.config.steps

    @property
    def name(self) -> str:
        return self.phase.label

    @property
    def steps(self) -> int:
        """Number of the last logged step."""
        last: int = self.rows[-1]["step"]
        return last

    @property
    def parameters(self) -> ParameterCount:
        return count_parameters(self.model)

    @property
    def seconds(self) -> float:
        """Seconds of its steps so far."""
        seconds: float = self.rows[-1]["run_seconds"] - self.rows[0]["run_seconds"]
        return seconds

    @property
    def unfinished(self) -> str:
        """Progress in a few words, for an unfinished phase."""
        if self.diverged is None:
            return f"phase {self.number} stopped at step {self.steps} of {self.planned_steps}"
        step, reason = self.diverged["step"], self.diverged["reason"]
        return f"phase {self.number} diverged at step {step} of {self.planned_steps}: {reason}"

    def column(self, name: str) -> list[tuple[Row, Any]]:
        """Return the rows that have a value under a name, with the value."""
        return [(row, row[name]) for row in self.rows if name in row]


@dataclass(frozen=True)
class RunRecord:
    """A run, finished or not."""

    path: Path
    run: RunConfig
    phases: list[PhaseRecord]
    planned_phases: tuple[int, ...]
    boundaries: dict[str, Row]  # certificates, passed or not, by name, such as `1-2`
    environment: Row
    data: Row
    experts: Row | None  # written by `mlxmoe experts`
    unread: tuple[str, ...] = ()  # a line for each part that could not be read

    @property
    def missing(self) -> list[str]:
        """Parts that are missing from the planned run, a few words each."""
        begun = {phase.number: phase for phase in self.phases}
        missing = [
            begun[number].unfinished if number in begun else self._without_rows(number)
            for number in self.planned_phases
            if number not in begun or begun[number].event is None
        ]
        files = {ENVIRONMENT: self.environment, DATA: self.data}
        missing += [f"no {name}" for name, values in files.items() if not (values or self._is_unread(name))]
        if any(phase.model.moe for phase in self.phases) and not (self.experts or self._is_unread(EXPERTS_FILE)):
            missing.append(f"no {EXPERTS_FILE} (mlxmoe experts {self.path} writes it)")
        return missing

    def _is_unread(self, name: str) -> bool:
        return any(str(self.path / name) in line for line in self.unread)

    def _without_rows(self, number: int) -> str:
        if number < self.phases[-1].number:
            return f"phase {number} has no rows in {METRICS}"
        return f"phase {number} was not begun"


def read_record(path: Path) -> RunRecord:
    """Read a run's folder; check each file against its schema and against the others.

    Unreadable parts are omitted and listed in `unread`. Raises InputError if that leaves no config, or no row of
    `metrics.jsonl`.
    """
    run = read_run_config(path)
    unread = list[str]()
    phases = _phases(run, _log(path / METRICS, records.MetricsRow, unread), unread)
    if not phases:
        if unread:
            raise InputError(f"cannot read any row of {path / METRICS}; {unread[0]}")
        raise InputError(f"{path} has no rows in {METRICS} yet; wait for the first, or resume: {resume_command(path)}")
    _add_history(phases, _log(path / HISTORY, records.HistoryRow, unread), unread)
    return RunRecord(
        path=path,
        run=run,
        phases=phases,
        planned_phases=_planned_phases(path, run, unread),
        boundaries=_boundaries(path / "boundaries", run, unread),
        environment=_file(records.Environment, path / ENVIRONMENT, unread),
        data=_file(records.Provenance, path / DATA, unread),
        experts=_file(records.ExpertsRecord, path / EXPERTS_FILE, unread, records.LARGEST_EXPERTS) or None,
        unread=tuple(unread),
    )


def read_run_config(path: Path) -> RunConfig:
    """Return a run's config. Raises InputError if it is missing or unreadable."""
    file = path / CONFIG
    try:
        is_there = stat.S_ISREG(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_there = False
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    if not is_there:
        lacking = f"no {CONFIG} in it" if path.is_dir() else "no such folder"
        raise InputError(f"no run at {path}: there is {lacking}; name a folder that mlxmoe train wrote")
    values = read_mapping(file)
    try:
        return read_run(path, values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {_one_line(error)}") from None


def _planned_phases(path: Path, run: RunConfig, unread: list[str]) -> tuple[int, ...]:
    """Return the phases that the run was to train when it was begun or last resumed."""
    try:
        identity = read_identity(path)
    except InputError as error:
        unread.append(_one_line(error))
        identity = None
    last = run.last_phase if identity is None else identity.last_phase
    return tuple(range(run.first_phase, last + 1))


def _log(file: Path, kind: Any, unread: list[str]) -> list[Row]:
    """Return a log's valid rows."""
    said = list[str]()
    try:
        rows = jsonl.read(file, kind, said.append)
    except InputError as error:
        rows, said = [], [str(error)]
    unread += map(_one_line, said)
    return rows


def _file(kind: type[BaseModel], file: Path, unread: list[str], at_most: int = LARGEST_CONFIG) -> Row:
    """Return a file's values; an empty row if it is missing or invalid."""
    if not os.path.lexists(file):
        return {}
    try:
        return records.read_record(kind, file, at_most).model_dump()
    except InputError as error:
        unread.append(_one_line(error))
        return {}


def _boundaries(folder: Path, run: RunConfig, unread: list[str]) -> dict[str, Row]:
    known = [f"{number}-{number + 1}" for number in range(start_phase(run), phase_numbers(run)[-1])]
    files = sorted(folder.glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    if odd := [file.name for file in files if file.stem not in known]:
        unread.append(
            f"{folder}: {len(odd)} files were left out; the first: {odd[0]} is not {' or '.join(known) or 'any'}.json"
        )
    read = {file.stem: _file(records.BoundaryRecord, file, unread) for file in files if file.stem in known}
    return {name: certificate for name, certificate in read.items() if certificate}


def _phases(run: RunConfig, rows: Sequence[Row], unread: list[str]) -> list[PhaseRecord]:
    """Return the phases that have rows; omit phases that the config does not allow."""
    phases: list[PhaseRecord] = []
    n_not_finite = 0
    for number in phase_numbers(run):
        own = []
        for row in rows:
            if row["phase"] == number:
                own.append({name: value for name, value in row.items() if _is_figure(value)})
                n_not_finite += sum(value is not None for value in row.values()) - len(own[-1])
        if not own:
            continue
        try:
            phase = get_phase(run, number)
        except InputError as error:
            unread.append(_one_line(f"{METRICS}: phase {number} was left out, which {CONFIG} does not allow: {error}"))
            continue
        tokens_per_step = run.training.batch_size * phase.model.context_length
        faults = list[str]()
        if usable := list(_usable(own, phase, tokens_per_step, faults)):
            before = phases[-1].rows[-1] if phases else {}
            phases.append(PhaseRecord(phase, _in_the_run(usable, before), None))
        if faults:
            unread.append(
                f"{METRICS}: {len(faults)} of {len(own)} rows of phase {number} were left out; the first: {faults[0]}"
            )
    if n_not_finite:
        unread.append(f"{METRICS}: {n_not_finite} figures are not finite and were left out")
    return phases


def _is_figure(value: Any) -> bool:
    """Return whether a value is present, and finite throughout."""
    if isinstance(value, list):
        return all(map(_is_figure, value))
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _usable(rows: Iterable[Row], phase: Phase, tokens_per_step: int, faults: list[str]) -> Iterator[Row]:
    """Yield a phase's rows that fit its model and each other, by ascending step; of two rows of a step, the later."""
    by_step: dict[int, Row] = {}
    model, planned_steps = phase.model, phase.config.steps
    shape = [model.moe.n_experts if model.moe else 0] * len(model.expert_layers)
    for row in rows:
        step, tokens = row["step"], row.get("tokens", 0)
        load_LE, entropy_L = row.get("expert_load"), row.get("router_entropy")
        if step in by_step:
            faults.append(f"step {step} comes twice")
        if step > planned_steps:
            faults.append(f"step {step} is beyond the phase's {planned_steps}")
        elif tokens > step * tokens_per_step:
            faults.append(f"{tokens} tokens at step {step}, where {tokens_per_step} are in a batch")
        elif load_LE is not None and not (shape and [len(load_E) for load_E in load_LE] == shape):
            faults.append(f"the expert_load of step {step} is not that of {_experts(model)}")
        elif entropy_L is not None and not (shape and len(entropy_L) == len(shape)):
            faults.append(f"the router_entropy of step {step} is not that of {_experts(model)}")
        else:
            by_step[step] = row
    most = 0
    for step, row in sorted(by_step.items()):
        if row.get("tokens", 0) < most:
            faults.append(f"step {step} has fewer tokens than one before it")
        else:
            most = row.get("tokens", 0)
            yield row


def _experts(model: ModelConfig) -> str:
    n_experts = model.moe.n_experts if model.moe else 0
    return f"{len(model.expert_layers)} layers of {n_experts} experts"


def _add_history(phases: list[PhaseRecord], history: Sequence[Row], unread: list[str]) -> None:
    """Add their history rows to the phases."""
    rows = {event: {row["phase"]: row for row in history if row["event"] == event} for event in ("phase", "diverged")}
    for i, phase in enumerate(phases):
        diverged = rows["diverged"].get(phase.number)
        if diverged and diverged["step"] < phase.steps:  # the run was resumed and got beyond it
            diverged = None
        phases[i] = replace(phase, event=rows["phase"].get(phase.number), diverged=diverged)
    for number in sorted(rows["phase"].keys() - {phase.number for phase in phases}):
        unread.append(f"{HISTORY}: phase {number} is finished, and {METRICS} has no row of it that can be used")


def _in_the_run(rows: Sequence[Row], before: Row) -> list[Row]:
    """Return a phase's rows with their positions in the run, given the last row of the previous phase."""
    step, tokens = before.get("run_step", 0), before.get("run_tokens", 0)
    seconds, last_step = before.get("run_seconds", 0.0), 0
    placed = []
    for row in rows:
        seconds += row.get("step_ms", 0) * (row["step"] - last_step) / 1e3
        last_step = row["step"]
        place = {"run_step": step + row["step"], "run_tokens": tokens + row.get("tokens", 0), "run_seconds": seconds}
        placed.append(row | place)
    return placed


def _one_line(error: object) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} …"
