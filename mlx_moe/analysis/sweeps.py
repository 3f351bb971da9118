"""Configs of a sweep: a file with base settings and axes becomes one config per run.

An axis is a config key with a list of values, or a name with variants, each of which sets several keys:

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
phase so that its total equals that of the variant NAME.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import RunConfig, Whole
from mlx_moe.data.tokens import prepare
from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_PHASES
from mlx_moe.phases import phase_config, phase_model
from mlx_moe.presets import FOLDER, as_overrides, load_run
from mlx_moe.storage.reading import read_mapping
from mlx_moe.terminal import printable
from mlx_moe.training.run import fit_vocabulary
from mlx_moe.validation import nearest, validate

Budget = Literal["tokens", "flops"]
Variant = dict[str, Any]
MOST_RUNS = 1000  # each takes seconds to start
LONGEST_NAME = 240  # bytes: file systems allow 255, and names of logs and failed runs are longer
# Other entries of a sweep's folder. Names with a leading dot are hidden, or lock files.
RESERVED = {"logs", "plots", "sweep.json", "results.jsonl", "results.csv", "summary.json", "fits.json"}
SET_ASIDE = re.compile(r".*\.failed(-[0-9]+)?", re.DOTALL)


class SweepConfig(BaseModel):
    """Contents of a sweep's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    preset: str = "three-phase"
    n_phases: Whole = Field(1, ge=1, le=MAX_PHASES)
    overrides: Variant = {}
    axes: dict[str, Any] = Field(min_length=1)  # per axis, a list of values or a mapping of variants


@dataclass(frozen=True)
class Equal:
    """A budget to match: that of the run with `variant` on `axis` and otherwise the same choices."""

    budget: Budget
    axis: str
    variant: str


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep. `choices`: its value or variant name on each axis."""

    name: str
    choices: dict[str, Any]
    n_phases: int
    config: RunConfig
    equal: Equal | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the run's entry in `sweep.json`, exactly as it is read back."""
        values = {"choices": self.choices, "n_phases": self.n_phases, "config": self.config.model_dump(mode="json")}
        return cast(dict[str, Any], json.loads(json.dumps(values)))


def sweep_names() -> list[str]:
    """Return the names of the built-in sweeps."""
    return sorted(path.stem for path in (FOLDER / "sweeps").glob("*.yaml"))


def load_sweep(name: str) -> SweepConfig:
    """Read a sweep by its file, or by the name of a built-in one.

    Raises InputError if it is invalid; the axes' values are checked by `expand`.
    """
    if name in sweep_names():
        path = FOLDER / "sweeps" / f"{name}.yaml"
    elif os.path.isfile(name):
        path = Path(name)
    else:
        known = sweep_names()
        raise InputError(f"no sweep {name!r}: {nearest(name, known)}known: {', '.join(known)}, or name a YAML file")
    sweep = validate(SweepConfig, read_mapping(path))
    if (fault := name_fault(sweep.name)) is not None:
        raise InputError(f"name {sweep.name!r} {fault}; it is the name of the sweep's folder")
    return sweep


def name_fault(name: str) -> str | None:
    """Explain why a name cannot be a folder's; None if it can."""
    if not name or name[0] in ".-":
        return "is empty" if not name else "begins with a dot or a dash"
    if name != name.strip():
        return "begins or ends with a blank"
    if set("/\\") & set(name) or printable(name) != name or set("\n\t") & set(name):
        return "holds a slash, a control character or half of a character"
    if len(name.encode()) > LONGEST_NAME:
        return f"has {len(name.encode()):,} bytes, and at most {LONGEST_NAME} are possible"
    if name.casefold() in RESERVED or SET_ASIDE.fullmatch(name.casefold()):
        return "is what something else in a sweep's folder is called"
    return None


def expand(sweep: SweepConfig, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Return the runs of a sweep, with its last axis varying fastest; axes take precedence over `overrides`.

    Raises InputError, naming the run or the axis, if there are too many runs, if two would share a folder, or if a
    config is invalid.
    """
    for axis, choices in sweep.axes.items():
        if not isinstance(choices, list | dict) or not choices:
            raise InputError(f"axis {axis!r} must be a list of values or a mapping of variants, with one at least")
    if (n_runs := math.prod(map(len, sweep.axes.values()))) > MOST_RUNS:
        raise InputError(f"the axes make {n_runs:,} runs, and a sweep has {MOST_RUNS:,} at most; shorten them")
    axes = {axis: _variants(axis, choices) for axis, choices in sweep.axes.items()}
    combinations = list(product(*axes.values()))
    _check_names([_name(axes, combination) for combination in combinations])
    planned = {combination: _plan(sweep, axes, combination, overrides) for combination in combinations}
    vocabularies: dict[str, int] = {}
    return [_equalized(run, combination, axes, planned, vocabularies) for combination, run in planned.items()]


def budget(run: PlannedRun, kind: Budget) -> list[int]:
    """Return the tokens or training FLOPs per step, for each of the run's phases."""
    tokens = run.config.training.batch_size * run.config.model.context_length
    if kind == "tokens":
        return [tokens] * run.n_phases
    models = [phase_model(run.config, phase) for phase in range(1, run.n_phases + 1)]
    return [tokens * flops_per_token(model).training for model in models]


def _variants(axis: str, choices: list[Any] | dict[Any, Any]) -> dict[str, Variant]:
    """Return the settings of each choice of an axis, by the choice's name."""
    if isinstance(choices, dict):
        variants: dict[str, Variant] = {}
        for name, variant in choices.items():
            if not isinstance(name, str):
                raise InputError(f"axis {axis!r}: the variant {name!r} must have a text as its name; quote it")
            if fault := name_fault(name):
                raise InputError(f"axis {axis!r}: the variant's name {name!r} {fault}; take another name")
            if not isinstance(variant, dict | None) or not all(isinstance(key, str) for key in variant or {}):
                raise InputError(f"axis {axis!r}: the variant {name!r} must be a mapping of config keys to values")
            variants[name] = variant or {}
    else:
        variants = {str(value): {axis: value} for value in choices}
        if len(variants) < len(choices):
            names = [str(value) for value in choices]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"axis {axis!r} has {twice} twice; leave one out")
    for name, variant in variants.items():
        if not _is_finite(variant):
            raise InputError(f"axis {axis!r}: {name} holds a number that is not finite; name another")
    return variants


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _name(axes: Mapping[str, Mapping[str, Variant]], combination: Sequence[str]) -> str:
    """Return a run's name. Values may contain slashes, as Hugging Face's tokenizer names do; the name does not."""
    return ",".join(_label(axis, choice) for axis, choice in zip(axes, combination, strict=True)).replace("/", "_")


def _label(axis: str, choice: str) -> str:
    """Return `d_model=64`; a variant's name is sufficient by itself."""
    key = axis.rpartition(".")[2]
    return f"{key}={choice}" if "." in axis or axis == "seed" else choice


def _check_names(names: Sequence[str]) -> None:
    """Raise InputError if a name is invalid for a folder, or two coincide on a file system that ignores case."""
    taken: dict[str, str] = {}
    for name in names:
        if fault := name_fault(name):
            raise InputError(f"run {name!r} {fault}; name its variants or values otherwise")
        before = taken.setdefault(unicodedata.normalize("NFD", name).casefold(), name)
        if before is not name:
            raise InputError(
                f"runs {before!r} and {name!r} would share a folder; give them variants whose names differ"
            )


def _plan(
    sweep: SweepConfig, axes: Mapping[str, Mapping[str, Variant]], combination: Sequence[str], overrides: Sequence[str]
) -> PlannedRun:
    keys: Variant = {"n_phases": sweep.n_phases}
    name, equal = _name(axes, combination), None
    for axis, choice in zip(axes, combination, strict=True):
        keys |= axes[axis][choice]
        if "equal" in axes[axis][choice]:
            equal = _read_equal(name, axis, keys.pop("equal"))
    n_phases = keys.pop("n_phases")
    with _naming(name):
        config = load_run(sweep.preset, None, [*as_overrides(sweep.overrides), *overrides, *as_overrides(keys)])
    if type(n_phases) is not int or not 1 <= n_phases <= len(config.phases):
        known = ", ".join(config.phases)
        raise InputError(f"run {name}: n_phases {n_phases!r}; must be from 1 to {len(config.phases)} ({known})")
    values = {
        axis: choice if isinstance(sweep.axes[axis], dict) else axes[axis][choice][axis]
        for axis, choice in zip(axes, combination, strict=True)
    }
    return PlannedRun(name, values, n_phases, config.model_copy(update={"name": name}), equal)


def _read_equal(run: str, axis: str, values: Any) -> Equal:
    if isinstance(values, dict) and len(values) == 1:
        ((kind, variant),) = values.items()
        if kind in get_args(Budget) and isinstance(variant, str):
            return Equal(kind, axis, variant)
    raise _bad_equal(run, values)


def _bad_equal(run: str, values: Any) -> InputError:
    return InputError(
        f"run {run}: equal {values!r} must be tokens or flops, and name a variant beside it that is equal to none "
        "itself"
    )


@contextmanager
def _naming(run: str) -> Iterator[None]:
    """Prefix each line of an InputError with the run's name."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"run {run}: {line}" for line in error.lines)) from None


def _equalized(
    run: PlannedRun,
    combination: tuple[str, ...],
    axes: Mapping[str, Mapping[str, Variant]],
    planned: Mapping[tuple[str, ...], PlannedRun],
    vocabularies: dict[str, int],
) -> PlannedRun:
    if run.equal is None:
        return run
    kind, place = run.equal.budget, list(axes).index(run.equal.axis)
    reference = planned.get((*combination[:place], run.equal.variant, *combination[place + 1 :]))
    if reference is None or reference.equal:
        raise _bad_equal(run.name, {kind: run.equal.variant})
    if kind == "flops":  # vocabulary size, and so FLOPs, depend on the text
        run, reference = (_with_vocabulary(planned, vocabularies) for planned in (run, reference))
    with _naming(run.name):
        goal = sum(_spent(reference, kind))
        per_step, spent = budget(run, kind)[-1], sum(_spent(run, kind)[:-1])
        steps = round(Fraction(goal - spent, per_step))
        if steps < 1:
            raise InputError(f"its first phases take more {kind} than {reference.name} in all; shorten them")
        name = list(run.config.phases)[run.n_phases - 1]
        before = run.config.phases[name]
        phase = validate(type(before), before.model_dump() | {"steps": steps})
    phases = run.config.phases | {name: phase}
    return replace(run, config=run.config.model_copy(update={"phases": phases}))


def _spent(run: PlannedRun, kind: Budget) -> list[int]:
    steps = [phase_config(run.config, phase).steps for phase in range(1, run.n_phases + 1)]
    return [number * per_step for number, per_step in zip(steps, budget(run, kind), strict=True)]


def _with_vocabulary(run: PlannedRun, known: dict[str, int]) -> PlannedRun:
    """Return the run with its tokenizer's vocabulary size; `known` caches it by data config."""
    data = run.config.data.model_dump_json()
    with _naming(run.name):
        if data not in known:
            known[data] = prepare(run.config.data).tokenizer.vocab_size
        return replace(run, config=fit_vocabulary(run.config, known[data]))
