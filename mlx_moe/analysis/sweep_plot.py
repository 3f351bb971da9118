"""Figure of a sweep: the loss of each choice over tokens and over FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mlx_moe.analysis.comparison import CurvePoint, curve
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.analysis.scaling_plot import shade
from mlx_moe.analysis.sweep_results import LARGEST_LOSS
from mlx_moe.analysis.sweep_worker import SWEEP, read_sweep
from mlx_moe.analysis.sweeps import name_fault
from mlx_moe.errors import InputError
from mlx_moe.storage import jsonl
from mlx_moe.storage.records import MetricsRow
from mlx_moe.storage.run_folder import METRICS

AXES = {"tokens": "tokens", "flops": "training FLOPs"}
SHOWN_FROM = 0.25  # fraction of the curve to skip; its steep beginning would flatten the rest
DASHES = ["-", "--", "-.", ":"]
OUT_OF_SIGHT = 100.0  # times the visible height; nothing is drawn beyond
LEAST_HEIGHT = 1e-6  # of the visible range, in nats and relative to it


def choices(folder: Path) -> Figure:
    """Draw validation loss over tokens and over FLOPs, a line per choice: the mean of its seeds, and their range.

    Raises InputError if no run has begun.
    """
    curves = _curves(folder)
    longest = max(seeds[0][-1].tokens for seeds in curves.values())
    shown = [
        _loss(point)
        for seeds in curves.values()
        for seed in seeds
        for point in seed
        if point.tokens >= SHOWN_FROM * longest
    ]
    low, high = min(shown), max(shown)
    height = max(high - low, LEAST_HEIGHT, LEAST_HEIGHT * abs(high))
    figure = Figure(figsize=(7.2, 3.4))
    for axes, (budget, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for number, (choice, seeds) in enumerate(curves.items()):
            spent = [float(getattr(point, budget)) for point in seeds[0]]
            losses = np.array([[_loss(point) for point in seed] for seed in seeds])
            losses = losses.clip(low - OUT_OF_SIGHT * height, high + OUT_OF_SIGHT * height)
            colour = shade(number, len(curves))
            axes.fill_between(spent, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.22, linewidth=0)
            dashes = DASHES[number % len(DASHES)]
            axes.plot(spent, losses.mean(axis=0), dashes, color=colour, linewidth=1.3, label=_plain(choice))
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    room = 0.05 * height
    figure.axes[0].set_ylim(low - room, high + room)
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    figure.axes[0].legend(fontsize=8)
    return figure


def _loss(point: CurvePoint) -> float:
    return max(-LARGEST_LOSS, min(point.validation_loss, LARGEST_LOSS))


def _plain(text: str) -> str:
    """Return a label that Matplotlib draws literally: no formula, and not hidden by a leading underscore."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _curves(folder: Path) -> dict[str, list[list[CurvePoint]]]:
    """Return, per choice that has begun, the curves of its seeds up to the point that all reached."""
    found: dict[str, list[list[CurvePoint]]] = {}
    for name, run in read_sweep(folder).items():
        if fault := name_fault(name):
            raise InputError(f"cannot read {folder / SWEEP}: the run's name {name!r} {fault}")
        choice = ", ".join(
            value if isinstance(value, str) else f"{axis.rpartition('.')[2]} {json.dumps(value)}"
            for axis, value in run.choices.items()
            if axis != "seed"
        )
        if jsonl.read(folder / name / METRICS, MetricsRow) and (points := curve(read_record(folder / name))):
            found.setdefault(choice or "all", []).append(points)
    if not found:
        raise InputError(f"no run in {folder} has a validation loss yet; train them: mlxmoe sweep FILE --out {folder}")
    return {choice: [seed[: min(map(len, seeds))] for seed in seeds] for choice, seeds in found.items()}
