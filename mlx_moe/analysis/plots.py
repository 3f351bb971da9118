"""Figures of a run as SVG and PNG, drawn without a display; lines differ in lightness and marks as well as colour.

L layers, E experts, S logged steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from mlx_moe.analysis.fitting import FITS
from mlx_moe.analysis.run_reader import PhaseRecord, RunRecord, read_record
from mlx_moe.analysis.scaling_plot import read_fits, scaling
from mlx_moe.analysis.sweep_plot import choices
from mlx_moe.analysis.sweep_worker import SWEEP
from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import signature, writing
from mlx_moe.storage.run_folder import resume_command

# Okabe and Ito's colours: distinct for all kinds of colour vision, and in lightness.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"
STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "mlxmoe",  # makes files reproducible
}
ZOOM = 0.4  # shown on both sides of a boundary, as a fraction of the shorter phase
HIGHEST_LOAD = 2.0  # end of the colour scale, over the fair share
MOST_LAYERS = 48  # per figure
NARROWEST = 0.25  # relative to the widest column


def plot(path: Path, out: Path | None, warn: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Draw a run, or a sweep and its fits, into a folder; return the files.

    `warn` gets a line for each unreadable part of a run. Raises InputError if the path is neither.
    """
    fits, folder = (path / FITS, path) if os.path.isdir(path) else (path, path.parent)
    figures: dict[str, Figure | None] = {}
    with mpl.style.context(STYLE, after_reset=True), warnings.catch_warnings():  # overrides matplotlibrc
        warnings.simplefilter("ignore")  # matplotlib's layout warnings; ours go to `warn`
        if os.path.isfile(path / SWEEP):
            figures["choices"] = choices(path)
        if os.path.isfile(fits):
            counted, fitted = read_fits(fits)
            figures |= {f"scaling-{one.law}": scaling(one, counted) for one in fitted}
        if not figures:
            record = read_record(path)
            for line in record.unread:
                warn(line)
            figures |= {name: draw(record) for name, draw in FIGURES.items()}
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        if not drawn:
            raise InputError(f"no row of {path} has a figure to draw yet; train on: {resume_command(path)}")
        return [file for name, figure in drawn.items() for file in save(figure, out or folder / "plots", name)]


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    files = [out / f"{name}.svg", out / f"{name}.png"]
    for file in files:
        with writing(file, None, "plot") as partial:
            kind = file.suffix[1:]
            said = {"Date": None, "Creator": signature("plot")} if kind == "svg" else {"Software": signature("plot")}
            figure.savefig(partial, format=kind, dpi=160, metadata=said)
    return files


def loss(record: RunRecord) -> Figure | None:
    """Draw the training and validation loss of the whole run, and enlargements of its boundaries below."""
    losses = [value for phase in record.phases for name in LOSSES for _, value in phase.column(name)]
    if not losses:
        return None
    boundaries = list(pairwise(record.phases))
    figure = Figure(figsize=(7.2, 5.4 if boundaries else 3.2))
    heights = [1.15, 1] if boundaries else [1]
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    whole = rows[0].subplots()
    _draw_losses(whole, record)
    _mark_phases(whole, record)
    if min(losses) > 0:
        whole.set_yscale("log")
        _label_log_axis(whole)
    scale = ", log" if min(losses) > 0 else ""
    whole.set(xlabel="step of the run", ylabel=f"cross entropy (nats per token{scale})")
    whole.legend(loc="lower left")
    if boundaries:
        zooms = np.atleast_1d(rows[1].subplots(1, len(boundaries)))
        zooms[0].set_ylabel("nats per token")
        for axes, (before, after) in zip(zooms, boundaries, strict=True):
            _zoom(axes, record, before, after)
    return figure


def learning_rate(record: RunRecord) -> Figure | None:
    return _by_step(record, "learning_rate", "learning rate")


def gradient_norm(record: RunRecord) -> Figure | None:
    figure = _by_step(record, "grad_norm", "norm of the gradient, before clipping")
    if figure is None:
        return None
    axes, limit = figure.axes[0], record.run.optimizer.max_grad_norm
    if limit > axes.get_ylim()[1]:  # a line that high would compress all norms at the bottom
        axes.set_ylabel(f"{axes.get_ylabel()} at {limit:g}")
        return figure
    axes.axhline(limit, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"clipped at {limit:g}", (1, limit), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=8,
    )  # fmt: skip
    return figure


def speed(record: RunRecord) -> Figure | None:
    figure = _by_step(record, "tokens_per_s", "tokens per second")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def expert_load(record: RunRecord) -> Figure | None:
    """Draw each layer's expert load over the steps; a column for each phase with experts."""
    phases = [phase for phase in record.phases if phase.column("expert_load")]
    if not phases:
        return None
    shown = {phase.number: _evenly(len(phase.model.expert_layers), MOST_LAYERS) for phase in phases}
    figure = Figure(figsize=(7.2, 1.0 + 0.45 * max(map(len, shown.values()))))
    longest = max(phase.steps + 1 for phase in phases)
    widths = [max(phase.steps + 1, NARROWEST * longest) for phase in phases]
    columns = figure.subfigures(1, len(phases), squeeze=False, width_ratios=widths)[0]
    for phase, column in zip(phases, columns, strict=True):
        loads = phase.column("expert_load")
        load_LES = np.array([[load[place] for place in shown[phase.number]] for _, load in loads]).transpose(1, 2, 0)
        edges = _edges([row["step"] for row, _ in loads])
        layers = np.atleast_1d(column.subplots(len(load_LES), 1, sharex=True))
        for place, axes, load_ES in zip(shown[phase.number], layers, load_LES, strict=True):
            layer, n_experts = phase.model.expert_layers[place], len(load_ES)
            mesh = axes.pcolormesh(
                edges, np.arange(n_experts + 1), n_experts * load_ES,
                cmap="cividis", norm=Normalize(0, HIGHEST_LOAD), rasterized=True,
            )  # fmt: skip
            axes.invert_yaxis()
            axes.set_yticks([n_experts / 2], [f"layer {layer}"])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        layers[0].set_title(f"{phase.name}, a row each", loc="left")
        layers[-1].set_xlabel(f"step of phase {phase.number}")
        layers[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    bar = columns[-1].colorbar(mesh, ax=layers, extend="max", ticks=[0, 0.5, 1, 1.5, 2], aspect=30, pad=0.03)
    bar.set_label("load over the fair share")
    bar.outline.set_visible(False)
    return figure


FIGURES: dict[str, Callable[[RunRecord], Figure | None]] = {
    "loss": loss,
    "learning-rate": learning_rate,
    "gradient-norm": gradient_norm,
    "tokens-per-s": speed,
    "expert-load": expert_load,
}


LOSSES = {"cross_entropy": ("training, single batches", "-"), "validation_loss": ("validation", "o--")}


def _draw_losses(axes: Axes, record: RunRecord) -> None:
    for phase in record.phases:
        first = phase is record.phases[0]
        for name, (label, style) in LOSSES.items():
            axes.plot(
                *_points(phase, name), style, label=label if first else None, color=ORANGE if "o" in style else BLUE,
                linewidth=1.1, markersize=4, markeredgecolor="black", markeredgewidth=0.6,
            )  # fmt: skip


def _zoom(axes: Axes, record: RunRecord, before: PhaseRecord, after: PhaseRecord) -> None:
    boundary = after.rows[0]["run_step"]
    reach = max(1, round(ZOOM * min(before.steps, max(after.steps, 1))))
    _draw_losses(axes, record)
    axes.axvline(boundary, color="black", linewidth=0.8, linestyle=":")
    visible = [
        row[name]
        for phase in (before, after)
        for name in LOSSES
        for row, _ in phase.column(name)
        if abs(row["run_step"] - boundary) <= reach
    ]
    if visible:
        axes.set_ylim(*_with_margin(min(visible), max(visible)))
    axes.set(xlim=(boundary - reach, boundary + reach), xlabel="step of the run")
    verb = "upcycled" if after.number == 2 else "grown"
    certificate = record.boundaries.get(f"{before.number}-{after.number}", {})
    jump = certificate.get("loss_jump")
    axes.set_title(verb if jump is None else f"{verb}: jump in loss {_power_of_ten(jump)}", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """Return axis limits around values, which may all be equal."""
    size = max(abs(low), abs(high))
    margin = 0.08 * (high - low) if high - low > 1e-9 * size else 0.01 * (size or 1)
    return low - margin, high + margin


def _by_step(record: RunRecord, name: str, label: str) -> Figure | None:
    """Draw one non-negative quantity; None if no row has it."""
    if not any(phase.column(name) for phase in record.phases):
        return None
    figure = Figure()
    axes = figure.subplots()
    for phase in record.phases:
        axes.plot(*_points(phase, name), color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step of the run", ylabel=label)
    _mark_phases(axes, record)
    return figure


def _mark_phases(axes: Axes, record: RunRecord) -> None:
    """Draw a line at the start of each phase, and the phases' names above."""
    for phase in record.phases:
        start = phase.rows[0]["run_step"]
        if phase is not record.phases[0]:
            axes.axvline(start, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            phase.name, (start, 1), (3, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="bottom", fontsize=8,
        )  # fmt: skip
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_log_axis(axes: Axes) -> None:
    """Put ticks at 1, 2, 3 and 5 of each decade, as plain numbers."""
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:+.1e}".split("e")
    return rf"${mantissa} \times 10^{{{int(exponent)}}}$"


def _points(phase: PhaseRecord, name: str) -> tuple[list[int], list[float]]:
    pairs = phase.column(name)
    return [row["run_step"] for row, _ in pairs], [value for _, value in pairs]


def _evenly(n: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})


def _edges(steps: list[int]) -> list[float]:
    """Return the edges of cells centred on logged steps."""
    middles = [(one + other) / 2 for one, other in pairwise(steps)]
    return [steps[0] - 0.5, *middles, steps[-1] + 0.5]
