"""What a sweep runs: a file with a base and axes over it becomes one config per run.

An axis is a config key with a list of values, or a name of its own with variants, each of which sets several keys:

    name: width
    preset: demo                    # a run or an architecture
    n_phases: 1                     # how many phases every run trains
    overrides: {phases.dense.steps: 200}
    axes:
      model.d_model: [64, 128]
      arm:
        long: {phases.dense.steps: 400}
        other: {n_phases: 2, equal: {flops: long}}
      seed: [0, 1, 2]

Every combination is a run. A variant's `equal: {tokens: NAME}` or `equal: {flops: NAME}` sets the steps of its last
phase so that, in all, it takes as many as the variant NAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import PhasesConfig, RunConfig
from mlx_moe.data.tokens import prepare
from mlx_moe.errors import InputError
from mlx_moe.presets import FOLDER, as_overrides, load_run
from mlx_moe.storage.reading import read_mapping
from mlx_moe.training.boundary import phase_config, phase_model
from mlx_moe.training.phases import fit_vocabulary
from mlx_moe.validation import nearest, validate

Budget = Literal["tokens", "flops"]
Variant = dict[str, Any]
PHASE_KEYS = tuple(PhasesConfig.model_fields)


class SweepConfig(BaseModel):
    """A sweep's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    preset: str = "three-phase"
    n_phases: int = Field(1, ge=1, le=3)
    overrides: Variant = {}
    axes: dict[str, list[Any] | dict[str, Variant]] = Field(min_length=1)


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep. `choices`: what it takes on each axis, a value or a variant's name."""

    name: str
    choices: dict[str, Any]
    n_phases: int
    config: RunConfig
    equal: dict[Budget, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"choices": self.choices, "n_phases": self.n_phases, "config": self.config.model_dump(mode="json")}


def sweep_names() -> list[str]:
    """The sweeps that come with the package."""
    return sorted(path.stem for path in (FOLDER / "sweeps").glob("*.yaml"))


def load_sweep(name: str) -> SweepConfig:
    """A sweep by its file, or by the name of one that comes with the package. Raises InputError on a fault in it."""
    path = Path(name)
    if name in sweep_names():
        path = FOLDER / "sweeps" / f"{name}.yaml"
    elif not path.is_file():
        known = sweep_names()
        raise InputError(f"no sweep {name!r}: {nearest(name, known)}known: {', '.join(known)}, or name a YAML file")
    return validate(SweepConfig, read_mapping(path))


def expand(sweep: SweepConfig, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """The runs of a sweep, with its last axis varying fastest. `overrides` (`key=value`) lie under the axes.

    Raises InputError, which names the run, where a config is not valid.
    """
    axes = {axis: _choices(axis, choices) for axis, choices in sweep.axes.items()}
    planned = []
    for combination in product(*(choices.items() for choices in axes.values())):
        chosen = dict(zip(axes, (name for name, _ in combination), strict=True))
        keys: Variant = {"n_phases": sweep.n_phases}
        for _, variant in combination:
            keys |= variant
        name = ",".join(_label(axis, choice) for axis, choice in chosen.items()).replace("/", "_")
        n_phases, equal = keys.pop("n_phases"), keys.pop("equal", None)
        if n_phases not in (1, 2, 3):
            raise InputError(f"run {name}: n_phases {n_phases!r}; must be 1, 2 or 3")
        written = [*as_overrides(sweep.overrides), *overrides, *as_overrides(keys)]
        try:
            config = load_run(sweep.preset, None, written)
        except InputError as error:
            raise InputError("\n".join(f"run {name}: {line}" for line in str(error).splitlines())) from None
        values = {axis: _value(sweep.axes[axis], choice) for axis, choice in chosen.items()}
        planned.append(PlannedRun(name, values, n_phases, config.model_copy(update={"name": name}), equal))
    return [_equalized(run, planned) for run in planned]


def budget(run: PlannedRun, kind: Budget) -> list[int]:
    """Tokens, or training FLOPs, that a step of each of the run's phases takes."""
    tokens = run.config.training.batch_size * run.config.model.context_length
    if kind == "tokens":
        return [tokens] * run.n_phases
    models = [phase_model(run.config, phase) for phase in range(1, run.n_phases + 1)]
    return [tokens * flops_per_token(model).training for model in models]


def _choices(axis: str, choices: list[Any] | dict[str, Variant]) -> dict[str, Variant]:
    if isinstance(choices, dict):
        return {name: variant or {} for name, variant in choices.items()}
    return {str(value): {axis: value} for value in choices}


def _value(choices: list[Any] | dict[str, Variant], name: str) -> Any:
    return name if isinstance(choices, dict) else next(value for value in choices if str(value) == name)


def _label(axis: str, choice: str) -> str:
    """`d_model=64`; a variant's name says enough by itself."""
    key = axis.rpartition(".")[2]
    return f"{key}={choice}" if "." in axis or axis == "seed" else choice


def _equalized(run: PlannedRun, all_runs: list[PlannedRun]) -> PlannedRun:
    if run.equal is None:
        return run
    kind, other = next(iter(run.equal.items()))
    references = [
        candidate
        for candidate in all_runs
        if other in candidate.choices.values()
        and sum(candidate.choices[axis] != run.choices[axis] for axis in run.choices) == 1
    ]
    if kind not in ("tokens", "flops") or len(run.equal) != 1 or not references or references[0].equal:
        raise InputError(
            f"run {run.name}: equal {run.equal} must be tokens or flops, and name a variant beside it that is equal to "
            "none itself"
        )
    reference = references[0]
    if kind == "flops":  # the vocabulary's share of them is known once the text is
        run, reference = (_with_vocabulary(planned) for planned in (run, reference))
    goal = sum(_spent(reference, kind))
    per_step, spent = budget(run, kind)[-1], sum(_spent(run, kind)[:-1])
    steps = round((goal - spent) / per_step)
    if steps < 1:
        raise InputError(
            f"run {run.name}: its first phases take more {kind} than {reference.name} in all; shorten them"
        )
    key = PHASE_KEYS[run.n_phases - 1]
    phase = getattr(run.config.phases, key).model_copy(update={"steps": steps})
    phases = run.config.phases.model_copy(update={key: phase})
    return replace(run, config=run.config.model_copy(update={"phases": phases}))


def _spent(run: PlannedRun, kind: Budget) -> list[int]:
    steps = [phase_config(run.config, phase).steps for phase in range(1, run.n_phases + 1)]
    return [number * per_step for number, per_step in zip(steps, budget(run, kind), strict=True)]


def _with_vocabulary(run: PlannedRun) -> PlannedRun:
    return replace(run, config=fit_vocabulary(run.config, prepare(run.config.data).tokenizer.vocab_size))
