"""Results of a sweep's runs in one table; over seeds, each choice compared with the first."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from mlx_moe.analysis.comparison import summarize
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.analysis.scaling import Point
from mlx_moe.analysis.sweeps import PlannedRun
from mlx_moe.errors import InputError
from mlx_moe.storage import jsonl
from mlx_moe.storage.atomic import replacing
from mlx_moe.storage.jsonl import Row
from mlx_moe.storage.reading import parse_json, read_text
from mlx_moe.storage.records import FailureRecord, HistoryRow, MetricsRow, ResultRow
from mlx_moe.storage.records import read_record as read_file
from mlx_moe.storage.run_folder import CONFIG, HISTORY, METRICS
from mlx_moe.training.console import Console, millions
from mlx_moe.validation import validate

RESULTS, TABLE, SUMMARY, FAILURE = "results.jsonl", "results.csv", "summary.json", "failure.json"
FINISHED, FAILED, INTERRUPTED, NOT_BEGUN, ELSEWHERE = (
    *("finished", "failed", "interrupted", "not begun"),
    "running elsewhere",  # another process trains in its folder
)
LEVEL = 0.95
LARGEST_LOSS = 1e100  # larger values overflow in sums and squares
LARGEST_RESULTS = 256 << 20  # bytes


@dataclass(frozen=True)
class Effect:
    """Mean validation loss (nats per token) of a choice over seeds, and its difference from the first choice.

    The difference is paired by seed, which cancels the seeds' effects. Both have Student's t intervals at LEVEL, None
    for a single seed.
    """

    choice: dict[str, Any]
    seeds: int
    loss: float
    loss_interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None


def gather(planned: Sequence[PlannedRun], out: Path) -> list[Row]:
    """Return a row per run: its choices, status (finished, failed, interrupted, not begun) and results."""
    return [row_of(run, out / run.name) for run in planned]


def row_of(run: PlannedRun, folder: Path) -> Row:
    """Return a run's row, read from its folder.

    A run has finished once its last phase has. It failed if `failure.json` says so and is newer than everything the run
    wrote; a run resumed since then is judged anew. A finished run with unreadable files counts as failed.
    """
    row: Row = {"run": run.name, "status": NOT_BEGUN, "reason": None, "choices": run.choices, "seed": run.config.seed}
    try:
        if (folder / CONFIG).is_file():
            done = {event["phase"] for event in jsonl.read(folder / HISTORY, HistoryRow) if event["event"] == "phase"}
            row["status"] = FINISHED if run.n_phases in done else INTERRUPTED
        if row["status"] != FINISHED and (reason := _failure(folder)) is not None:
            row |= {"status": FAILED, "reason": reason}
        if row["status"] == FINISHED or jsonl.read(folder / METRICS, MetricsRow):
            came_to = asdict(summarize(read_record(folder)))
            del came_to["run"], came_to["curve"]
            row |= came_to
    except InputError as error:
        if row["status"] == FINISHED:
            row |= {"status": FAILED, "reason": error.lines[0]}
    return row


def write(rows: list[Row], out: Path) -> None:
    """Write `results.jsonl`, `results.csv`, and over seeds `summary.json`, each atomically."""
    flat = [_flat(row) for row in rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    texts = {
        RESULTS: "".join(json.dumps(row) + "\n" for row in rows),
        TABLE: table.getvalue(),
        SUMMARY: json.dumps({"level": LEVEL, "effects": [asdict(effect) for effect in effects(rows)]}, indent=2) + "\n",
    }
    for name, text in texts.items():
        with replacing(out / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _flat(row: Row) -> Row:
    """Return the row with a column for each axis; an axis with the name of a result gets a prefix."""
    flat = {key: value for key, value in row.items() if key != "choices"}
    for axis, choice in row["choices"].items():
        flat[f"axis {axis}" if axis in row and axis != "seed" else axis] = choice
    return flat


def effects(rows: Sequence[Row]) -> list[Effect]:
    """Return each choice's effect over the finished runs, relative to the first choice."""
    losses: dict[str, dict[int, float]] = {}
    choices: dict[str, dict[str, Any]] = {}
    for row in rows:
        choice = {axis: value for axis, value in row["choices"].items() if axis != "seed"}
        key = json.dumps(choice)
        choices[key] = choice
        if row["status"] == FINISHED and abs(row["validation_loss"]) < LARGEST_LOSS:
            losses.setdefault(key, {})[row["seed"]] = row["validation_loss"]
    first = losses.get(next(iter(choices), ""), {})
    found = []
    for key, by_seed in losses.items():
        paired = [by_seed[seed] - first[seed] for seed in by_seed.keys() & first.keys()]
        own = list(by_seed.values())
        difference = float(np.mean(paired)) if paired and by_seed is not first else None
        interval = None if difference is None else _interval(paired)
        found.append(Effect(choices[key], len(own), float(np.mean(own)), _interval(own), difference, interval))
    return found


def read_points(path: Path, parameters: str) -> list[Point]:
    """Return the finished runs of a sweep's folder or its results.jsonl as points of a scaling law.

    `parameters` is the count used as N: non_embedding, active or total. Raises InputError if there are no results, and
    at the first invalid row.
    """
    file = path / RESULTS if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise InputError(f"no results at {file}: name a sweep's folder, or its {RESULTS}")
    points = []
    for number, line in enumerate(read_text(file, LARGEST_RESULTS).split("\n"), 1):
        if not line.strip():
            continue
        row = _read_row(line, f"{file}, line {number}")
        if row.status == FINISHED:
            n, d, loss = getattr(row, f"parameters_{parameters}"), row.tokens, row.validation_loss
            if n is None or d is None or loss is None:
                raise InputError(
                    f"cannot read {file}, line {number}: a finished run has parameters_{parameters}, tokens and "
                    "validation_loss; run the sweep again, which writes them anew"
                )
            points.append(Point(n, d, loss, row.run))
    return points


def _read_row(line: str, where: str) -> ResultRow:
    values = parse_json(line, where)
    try:
        return validate(ResultRow, values)
    except InputError as error:
        fault = error.lines[0]
        raise InputError(f"cannot read {where}: {fault}; run the sweep again, which writes {RESULTS} anew") from None


def show(rows: Sequence[Row], out: Path, console: Console) -> None:
    console.table(
        ["run", "parameters", "tokens", "FLOPs", "time", "validation loss", "bits per byte"],
        [_cells(row) for row in rows],
    )
    found = effects(rows)
    if any(effect.seeds > 1 for effect in found):
        console.table(
            ["over seeds", "seeds", "validation loss", f"{100 * LEVEL:.0f} %", "to the first", f"{100 * LEVEL:.0f} %"],
            [
                [
                    ", ".join(map(str, effect.choice.values())),
                    str(effect.seeds),
                    f"{effect.loss:.4f}",
                    _between(effect.loss_interval),
                    "" if effect.difference is None else f"{effect.difference:+.4f}",
                    _between(effect.difference_interval),
                ]
                for effect in found
            ],
        )
    console.line(
        f"{sum(row['status'] == 'finished' for row in rows)} of {len(rows)} runs finished; see {out / RESULTS}"
    )


def _failure(folder: Path) -> str | None:
    """Return why a run failed; None if it did not, or has been resumed since."""
    file = folder / FAILURE
    if not file.is_file():
        return None
    written = [
        path.stat().st_mtime_ns for path in (folder / CONFIG, folder / METRICS, folder / HISTORY) if path.exists()
    ]
    if max(written, default=0) > file.stat().st_mtime_ns:
        return None
    try:
        return read_file(FailureRecord, file).reason
    except InputError as error:
        return str(error)


def _cells(row: Row) -> list[str]:
    if row["status"] != FINISHED:
        return [row["run"], "", "", "", "", row["status"], (row["reason"] or "")[:60]]
    return [
        row["run"],
        millions(row["parameters_total"]),
        f"{row['tokens'] / 1e6:.2f} M",
        f"{row['flops']:.2e}",
        f"{row['seconds']:.0f} s",
        f"{row['validation_loss']:.4f}",
        "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
    ]


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of the mean."""
    if len(values) < 2:
        return None
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    mean = float(np.mean(values))
    return mean - half, mean + half


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
