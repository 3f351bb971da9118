"""Runs side by side: which is best, in what they differ, and what each reached for the same tokens, FLOPs or time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.accounting.parameters import non_embedding_parameters
from mlx_moe.analysis.record import Record, read_record
from mlx_moe.errors import InputError
from mlx_moe.storage.run_folder import CONFIG
from mlx_moe.training.console import Console, millions
from mlx_moe.validation import by_path

BUDGETS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class CurvePoint:
    """A validation loss (nats per token) of a run, and what had been spent by then; `seconds` are those of steps."""

    phase: int
    step: int
    tokens: int
    flops: int
    seconds: float
    validation_loss: float


@dataclass(frozen=True)
class ComparedRun:
    """`bits_per_byte` is the last validation loss per byte of text: it compares runs of different tokenizers."""

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
    """Runs, the best first. `differences`: the config keys in which they differ, with the value of each run.

    `equal`: for each budget the largest that all runs spent, and the loss of each at it. `speedup`, of two runs: the
    lowest loss that both reach, and for each budget how many times what the best spends on it the other does.
    """

    runs: list[ComparedRun]
    differences: dict[str, list[Any]]
    equal: dict[str, dict[str, Any]]
    speedup: dict[str, Any] | None
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latest_runs(folder: Path, n: int) -> list[Path]:
    """The n runs in a folder that were begun last. Raises InputError where there are fewer than two."""
    found = [path for path in folder.glob("*") if (path / CONFIG).is_file()] if folder.is_dir() else []
    if len(found) < 2:
        raise InputError(f"{folder} holds {len(found)} runs; name runs to compare, or their folder with --folder")
    return sorted(found, key=lambda path: (path / CONFIG).stat().st_mtime)[-n:]


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare runs by their last validation loss, or per byte where their tokenizers differ.

    Raises InputError where a folder is no run, or has no validation loss yet.
    """
    records = [read_record(path) for path in paths]
    pairs = list(zip(records, [summarize(record) for record in records], strict=True))
    identities = {record.data.get("tokenizer", {}).get("identity") for record in records}
    by_byte = len(identities) > 1 and all(run.bits_per_byte is not None for _, run in pairs)
    pairs.sort(key=lambda pair: (pair[1].bits_per_byte if by_byte else None) or pair[1].validation_loss)
    runs = [run for _, run in pairs]
    return Comparison(
        runs=runs,
        differences=_differences([record.run.model_dump(mode="json") for record, _ in pairs]),
        equal={budget: _at_equal(runs, budget) for budget in BUDGETS},
        speedup=_speedup(*runs) if len(runs) == 2 else None,
        warnings=_warnings([record for record, _ in pairs], by_byte),
    )


def summarize(record: Record) -> ComparedRun:
    """What a run came to, as far as it went."""
    points = curve(record)
    if not points:
        raise InputError(f"{record.path} has no validation loss yet; train on: mlxmoe train --resume {record.path}")
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


def curve(record: Record) -> list[CurvePoint]:
    """The validation losses of a run, over all its phases."""
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
    """What a loss in nats per token is multiplied by, from the validation split of `data.json`."""
    split = data.get("validation", {})
    return split["tokens"] / split["bytes"] / math.log(2) if split.get("bytes") else None


def spent_to_reach(points: Sequence[CurvePoint], loss: float, budget: str) -> float:
    """How much of a budget a run spent when its curve first fell to a loss; straight between what was measured."""
    for before, after in pairwise(points):
        if before.validation_loss > loss >= after.validation_loss:
            share = (before.validation_loss - loss) / (before.validation_loss - after.validation_loss)
            start = float(getattr(before, budget))
            return start + share * (float(getattr(after, budget)) - start)
    return float(getattr(points[0], budget))


def show(comparison: Comparison) -> None:
    console, runs = Console(), comparison.runs
    labels = [Path(run.run).name for run in runs]
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
    console.facts([(label, run.architecture) for label, run in zip(labels, runs, strict=True)])
    if comparison.differences:
        console.title("In what they differ")
        console.table(["key", *labels], [[key, *map(_text, row)] for key, row in comparison.differences.items()])
    console.title("Validation loss for the same")
    console.table(
        ["", "of each", *labels],
        [
            [budget, f"{row['budget']:.3g}", *("" if loss is None else f"{loss:.4f}" for loss in row["losses"])]
            for budget, row in comparison.equal.items()
        ],
    )
    if (speedup := comparison.speedup) is not None:
        ratios = ", ".join(f"{speedup[budget]:.2f} × the {budget}" for budget in BUDGETS if speedup[budget])
        console.line(f"to a loss of {speedup['loss']:.4f}, {labels[1]} takes {ratios or 'nothing'} of {labels[0]}")
    for warning in comparison.warnings:
        console.warn(warning)


def _differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    flat = [by_path(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {key: [config.get(key) for config in flat] for key in keys if key != "name"}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _at_equal(runs: Sequence[ComparedRun], budget: str) -> dict[str, Any]:
    """The loss of every run at the largest budget that all spent; straight between what was measured."""
    common = min(getattr(run, budget) for run in runs)
    losses = []
    for run in runs:
        spent = [getattr(point, budget) for point in run.curve]
        losses.append(float(np.interp(common, spent, [point.validation_loss for point in run.curve])))
    return {"budget": common, "losses": losses}


def _speedup(ahead: ComparedRun, behind: ComparedRun) -> dict[str, Any]:
    """How many times what `ahead` spends on the lowest loss that both reach does `behind` spend on it."""
    loss = max(ahead.lowest_validation_loss, behind.lowest_validation_loss)
    ratios: dict[str, Any] = {"loss": loss}
    for budget in BUDGETS:
        spent = spent_to_reach(ahead.curve, loss, budget)
        ratios[budget] = spent_to_reach(behind.curve, loss, budget) / spent if spent else None
    return ratios


def _warnings(records: list[Record], by_byte: bool) -> list[str]:
    """Where the losses are not of the same text."""
    found = []
    if len({record.data.get("validation", {}).get("sha256") for record in records}) > 1 and not by_byte:
        found.append("the runs hold out different text, so their losses do not compare; see mlxmoe eval")
    if by_byte:
        found.append("the tokenizers differ, so runs are ranked by bits per byte; losses per token do not compare")
    windows = {(r.run.training.eval_sequences, r.run.model.context_length) for r in records}
    if len(windows) > 1:
        found.append("the runs measure on different windows (eval_sequences, context_length); see mlxmoe eval")
    return found


def _text(value: Any) -> str:
    return "" if value is None else str(value)
