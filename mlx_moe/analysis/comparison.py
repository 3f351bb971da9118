"""Comparison of runs: ranking, differing settings, and losses at equal tokens, FLOPs or time."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.accounting.parameters import non_embedding_parameters
from mlx_moe.analysis.run_reader import Row, RunRecord, read_record
from mlx_moe.errors import InputError
from mlx_moe.storage.run_folder import CONFIG, resume_command
from mlx_moe.training.console import Console, millions
from mlx_moe.validation import by_path

BUDGETS = ("tokens", "flops", "seconds")
NATS, BITS = "nats per token", "bits per byte"
LONGEST_VALUE = 200  # characters of a setting in the table


@dataclass(frozen=True)
class CurvePoint:
    """A validation loss (nats per token) of a run, and the budgets spent by then; `seconds` counts steps only."""

    phase: int
    step: int
    tokens: int
    flops: int
    seconds: float
    validation_loss: float


@dataclass(frozen=True)
class ComparedRun:
    """Summary of a run. `bits_per_byte` is its last validation loss per byte, comparable across tokenizers."""

    run: str
    architecture: str
    parameters_total: int
    parameters_active: int
    parameters_non_embedding: int
    phases: int
    tokens: int
    flops: int
    seconds: float
    validation_loss: float
    lowest_validation_loss: float
    bits_per_byte: float | None
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Comparison:
    """Runs, best first. `differences`: the config keys that differ, with each run's value.

    `equal`: for each budget, the largest that all runs spent, and each run's loss at it. `speedup`, for two runs: the
    lowest loss that both reach, and for each budget, the second run's cost of it relative to the best run's. Losses are
    in `unit`: nats per token, or bits per byte if the tokenizers differ; tokens are then no budget, because they are
    not the same text. If tokenizers differ and byte counts are unknown, nothing is compared.
    """

    runs: list[ComparedRun]
    differences: dict[str, list[Any]]
    equal: dict[str, dict[str, Any]]
    speedup: dict[str, Any] | None
    warnings: list[str]
    unit: str | None = NATS

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latest_runs(folder: Path, n: int) -> list[Path]:
    """Return the n most recently begun runs in a folder. Raises InputError if there are fewer than two."""
    begun: dict[Path, float] = {}
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # not a run, or one deleted a moment ago
                status = os.stat(folder / name / CONFIG)
                if stat.S_ISREG(status.st_mode) and not name.startswith("."):
                    begun[folder / name] = status.st_mtime
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"cannot look for runs in {folder}: {error.strerror}; name another --folder") from None
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--folder {folder} is no folder; name the one that holds the runs")
    if len(begun) < 2:
        raise InputError(f"{folder} holds {len(begun)} runs; name runs to compare, or their folder with --folder")
    return sorted(begun, key=lambda path: (begun[path], path))[-n:]


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare runs by their last validation loss, per byte if their tokenizers differ.

    Raises InputError if a folder is not a run, or has no validation loss yet.
    """
    records = [read_record(path) for path in paths]
    pairs = list(zip(records, [summarize(record) for record in records], strict=True))
    unit = _unit(records)
    pairs.sort(key=lambda pair: (pair[1].bits_per_byte if unit == BITS else None, pair[1].validation_loss))
    compared = [_in_unit(record, run, unit) for record, run in pairs]
    budgets = [budget for budget in BUDGETS if unit == NATS or (unit == BITS and budget != "tokens")]
    return Comparison(
        runs=[run for _, run in pairs],
        differences=_differences([record.run.model_dump(mode="json") for record, _ in pairs]),
        equal={budget: _at_equal(compared, budget) for budget in budgets},
        speedup=_speedup(compared[0], compared[1], budgets) if len(compared) == 2 and budgets else None,
        warnings=_warnings([record for record, _ in pairs], unit),
        unit=unit,
    )


def summarize(record: RunRecord) -> ComparedRun:
    """Summarise a run, finished or not."""
    points = curve(record)
    if not points:
        raise InputError(f"{record.path} has no validation loss yet; train on: {resume_command(record.path)}")
    count, last = count_parameters(record.phases[-1].model), points[-1]
    per_byte = nats_to_bits_per_byte(record.data)
    return ComparedRun(
        run=str(record.path),
        architecture=record.phases[-1].model.display_name,
        parameters_total=count.total,
        parameters_active=count.active,
        parameters_non_embedding=non_embedding_parameters(record.phases[-1].model),
        phases=record.phases[-1].number,
        tokens=last.tokens,
        flops=last.flops,
        seconds=round(last.seconds, 3),
        validation_loss=last.validation_loss,
        lowest_validation_loss=min(point.validation_loss for point in points),
        bits_per_byte=None if per_byte is None else last.validation_loss * per_byte,
        curve=points,
    )


def curve(record: RunRecord) -> list[CurvePoint]:
    """Return the validation losses of a run, over all its phases."""
    points, flops_before = [], 0
    for phase in record.phases:
        per_token = flops_per_token(phase.model).training
        tokens_before = phase.rows[0]["run_tokens"] - phase.rows[0].get("tokens", 0)
        for row in phase.rows:
            if "validation_loss" in row:
                flops = flops_before + (row["run_tokens"] - tokens_before) * per_token
                place = (phase.number, row["step"], row["run_tokens"], flops, row["run_seconds"])
                points.append(CurvePoint(*place, row["validation_loss"]))
        flops_before += (phase.rows[-1]["run_tokens"] - tokens_before) * per_token
    return points


def nats_to_bits_per_byte(data: dict[str, Any]) -> float | None:
    """Return the factor from nats per token to bits per byte, from the validation split in `data.json`."""
    split = data.get("validation", {})
    return split["tokens"] / split["bytes"] / math.log(2) if split.get("bytes") else None


def _unit(records: Sequence[RunRecord]) -> str | None:
    """Return the unit in which the runs' losses compare; None if unknown."""
    identities = {record.data.get("tokenizer", {}).get("identity") for record in records}
    if None not in identities and len(identities) == 1:
        return NATS
    return BITS if all(nats_to_bits_per_byte(record.data) for record in records) else None


def _in_unit(record: RunRecord, run: ComparedRun, unit: str | None) -> ComparedRun:
    """Return the run with its curve's losses converted to a unit."""
    scale = (nats_to_bits_per_byte(record.data) or 1.0) if unit == BITS else 1.0
    points = [replace(point, validation_loss=scale * point.validation_loss) for point in run.curve]
    return replace(run, curve=points, lowest_validation_loss=scale * run.lowest_validation_loss)


def spent_to_reach(points: Sequence[CurvePoint], loss: float, budget: str) -> float:
    """Return the budget spent when the curve first fell to a loss, interpolated linearly."""
    for before, after in pairwise(points):
        if before.validation_loss > loss >= after.validation_loss:
            share = (before.validation_loss - loss) / (before.validation_loss - after.validation_loss)
            start = float(getattr(before, budget))
            return start + share * (float(getattr(after, budget)) - start)
    return float(getattr(points[0], budget))


def show(comparison: Comparison) -> None:
    console, runs = Console(), comparison.runs
    labels = _labels([run.run for run in runs])
    console.table(
        ["run", "parameters", "active", "tokens", "FLOPs", "time", "val. loss", "bits/byte"],
        [
            [
                f"{rank}. {label}",
                millions(run.parameters_total),
                millions(run.parameters_active),
                f"{run.tokens / 1e6:.2f} M",
                f"{run.flops:.2e}",
                f"{run.seconds:.0f} s",
                f"{run.validation_loss:.4f}",
                "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}",
            ]
            for rank, (label, run) in enumerate(zip(labels, runs, strict=True), 1)
        ],
    )
    console.summary([(label, run.architecture) for label, run in zip(labels, runs, strict=True)])
    if comparison.differences:
        console.title("Differing settings")
        console.table(["key", *labels], [[key, *map(_text, row)] for key, row in comparison.differences.items()])
    if comparison.equal:
        console.title(f"Validation loss at equal budgets{'' if comparison.unit == NATS else f', {comparison.unit}'}")
        console.table(
            ["", "of each", *labels],
            [
                [budget, f"{row['budget']:.3g}", *(f"{loss:.4f}" for loss in row["losses"])]
                for budget, row in comparison.equal.items()
            ],
        )
    speedup = comparison.speedup or {}
    ratios = [f"{speedup[budget]:.2f} × the {budget}" for budget in BUDGETS if speedup.get(budget)]
    if ratios:
        loss = f"{speedup['loss']:.4f}" + ("" if comparison.unit == NATS else f" {comparison.unit}")
        console.line(f"to a loss of {loss}, {labels[1]} takes {', '.join(ratios)} of {labels[0]}")
    for warning in comparison.warnings:
        console.warn(warning)


def _labels(runs: Sequence[str]) -> list[str]:
    """Return the folders' names, or the paths if two names are equal."""
    names = [Path(os.path.abspath(run)).name for run in runs]
    return names if len(set(names)) == len(names) and all(names) else list(runs)


def _differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    flat = [by_path(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {key: [config.get(key) for config in flat] for key in keys if key != "name"}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _at_equal(runs: Sequence[ComparedRun], budget: str) -> dict[str, Any]:
    """Return each run's loss at the largest budget that all spent, interpolated linearly."""
    common = min(getattr(run, budget) for run in runs)
    losses = []
    for run in runs:
        spent = [float(getattr(point, budget)) for point in run.curve]  # FLOPs may exceed NumPy's integers
        losses.append(float(np.interp(float(common), spent, [point.validation_loss for point in run.curve])))
    return {"budget": common, "losses": losses}


def _speedup(ahead: ComparedRun, behind: ComparedRun, budgets: Sequence[str] = BUDGETS) -> dict[str, Any]:
    """Return the budgets of `behind` over those of `ahead` at the lowest loss that both reach."""
    loss = max(ahead.lowest_validation_loss, behind.lowest_validation_loss)
    ratios: dict[str, Any] = {"loss": loss}
    for budget in budgets:
        spent = spent_to_reach(ahead.curve, loss, budget)
        ratios[budget] = spent_to_reach(behind.curve, loss, budget) / spent if spent else None
    return ratios


def _warnings(records: list[RunRecord], unit: str | None) -> list[str]:
    """Return warnings: losses not on the same text, and runs that are incomplete or unreadable."""
    found = []
    if len({_held_out(record.data, unit) for record in records}) > 1:
        found.append("the runs hold out different text, so their losses do not compare; see mlxmoe eval")
    if unit == BITS:
        found.append("the tokenizers differ, so runs are ranked by bits per byte; losses per token do not compare")
    if unit is None:
        found.append("the tokenizers differ or are not known, so losses per token do not compare; see mlxmoe eval")
    windows = {(r.run.training.eval_sequences, r.run.model.context_length) for r in records}
    if len(windows) > 1:
        found.append("the runs measure on different windows (eval_sequences, context_length); see mlxmoe eval")
    for record in records:
        found += [f"{record.path}: {phase.unfinished}" for phase in record.phases if phase.diverged is not None]
        found += [line if str(record.path) in line else f"{record.path}: {line}" for line in record.unread]
    return found


def _held_out(data: Row, unit: str | None) -> Any:
    """Return a key that is equal for runs with the same validation text; token hashes require equal tokenizers."""
    if unit == NATS:
        return data["validation"]["sha256"]
    return unit and (data["source"]["identity"], data["validation_fraction"], data["validation"]["documents"])


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} …"
