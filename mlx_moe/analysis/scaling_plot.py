"""Figures of fitted scaling laws: the runs, the law, and the band of its interval.

N parameters, D tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from mlx_moe.analysis.scaling import FORMULAS, Estimate, Fit, Point, band, constant_names, predict
from mlx_moe.errors import InputError
from mlx_moe.storage.reading import read_json
from mlx_moe.storage.records import EstimateRecord, FitRecord, FitsRecord
from mlx_moe.validation import validate

Variable = Literal["n", "d"]

LINES = 4  # maximum, one per value of the other variable
BEYOND = 1.5  # how far a line extends beyond the outermost run
MARKS = "osD^"
LARGEST_FITS = 256 << 20  # bytes: 10,000 resamples are 1 MB


def read_fits(file: Path) -> tuple[str, list[Fit]]:
    """Return the count used as N, and the laws fitted by `mlxmoe fit`.

    Raises InputError if the file is invalid.
    """
    try:
        record = validate(FitsRecord, read_json(file, LARGEST_FITS))
        return record.parameters.replace("_", "-"), [_fit(one) for one in record.fits]
    except InputError as error:
        fault = error.lines[0].removeprefix(f"cannot read {file}: ")
        raise InputError(f"cannot read fits from {file}: {fault}; write it anew with mlxmoe fit") from None


def scaling(fitted: Fit, counted: str) -> Figure:
    """Draw loss over N, over D, or both side by side, with lines for some values of the other variable."""
    figure = Figure(figsize=(7.2, 3.8 if fitted.law == "ND" else 3.4))
    variables: list[Variable] = [variable for variable in ("n", "d") if variable.upper() in fitted.law]
    panels = figure.subplots(1, len(variables), squeeze=False, sharey=True)[0]
    for axes, variable in zip(panels, variables, strict=True):
        _draw(axes, fitted, variable)
        axes.set_xlabel(f"N ({counted} parameters)" if variable == "n" else "D (tokens)")
    panels[0].set_ylabel("validation loss (nats per token)")
    constants = [f"{name} {one.value:.3g} ({one.low:.3g}–{one.high:.3g})" for name, one in fitted.constants.items()]
    held = f"{FORMULAS[fitted.law]},  R² {fitted.r_squared:.4f},  {100 * fitted.level:g} % intervals"
    figure.suptitle(f"{held}\n{',  '.join(constants)}", fontsize=8, x=0.01, ha="left")
    return figure


def shade(place: int, count: int) -> tuple[float, float, float, float]:
    """Return the colour of one of several lines, each lighter than the previous."""
    return mpl.colormaps["cividis"](0.85 * place / max(count - 1, 1))


def _draw(axes: Axes, fitted: Fit, variable: Variable) -> None:
    measured = _column(fitted, variable)
    others = _column(fitted, "d" if variable == "n" else "n") if fitted.law == "ND" else np.ones(len(measured))
    lines = np.unique(others)
    if len(lines) > LINES:
        lines = np.geomspace(lines[0], lines[-1], LINES)
    nearest = np.abs(np.log(others[:, None] / lines)).argmin(axis=1)
    reach = np.geomspace(measured.min() / BEYOND, measured.max() * BEYOND, 100)
    losses = np.array([point.loss for point in fitted.points])
    for i, other in enumerate(lines):
        colour = shade(i, len(lines))
        place = {variable: reach, "d" if variable == "n" else "n": np.full_like(reach, other)}
        low, high = band(fitted, **place)
        line = predict(fitted.law, [one.value for one in fitted.constants.values()], **place)
        axes.fill_between(reach, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(reach, line, color=colour, linewidth=1.3)
        own = nearest == i
        name = f"{'D' if variable == 'n' else 'N'} {EngFormatter(sep='')(float(f'{other:.3g}'))}"
        axes.plot(
            measured[own], losses[own], MARKS[i], color=colour, markersize=5, markeredgecolor="black",
            markeredgewidth=0.6, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(lines) > 1:
        axes.legend(title=None if len(np.unique(others)) <= LINES else "nearest", fontsize=8)


def _column(fitted: Fit, variable: Variable) -> NDArray[np.float64]:
    return np.array([getattr(point, variable) for point in fitted.points], np.float64)


def _fit(record: FitRecord) -> Fit:
    """Convert the record of a fit, the inverse of `Fit.to_json`."""
    names = constant_names(record.law)
    if list(record.constants) != names:
        raise InputError(f"the constants of {record.law} are {', '.join(names)}, not {', '.join(record.constants)}")
    if any(len(draw) != len(names) for draw in record.draws):
        raise InputError(f"a draw of {record.law} has {len(names)} constants")
    optimal = record.optimal_exponent
    return Fit(
        law=record.law,
        constants={name: _estimate(estimate) for name, estimate in record.constants.items()},
        optimal_exponent=None if optimal is None else _estimate(optimal),
        level=record.level,
        r_squared=record.r_squared,
        leave_one_out_error=record.leave_one_out_error,
        degrees_of_freedom=record.degrees_of_freedom,
        points=[Point(point.n, point.d, point.loss, point.run) for point in record.points],
        predicted=[point.predicted for point in record.points],
        draws=record.draws,
    )


def _estimate(record: EstimateRecord) -> Estimate:
    return Estimate(record.value, record.low, record.high)
