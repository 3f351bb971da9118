"""Geometry of the page's charts, in percent of their width and height; `page.html` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parity.report import RoutingMargins, TensorError

MARGIN_DECADES = (-9, 1)  # of the strips of routing margins
N_TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A power of ten at `at` percent of the scale."""

    power: int
    at: float


@dataclass(frozen=True)
class ErrorGrowth:
    """RMSE over depth on a logarithmic scale, for the two programs compared."""

    mlx: str  # points of an SVG polyline
    torch: str
    ticks: tuple[Tick, ...]  # from the top
    first: str  # name of the first module
    last: str


@dataclass(frozen=True)
class MarginStrip:
    """Margins of one router on a logarithmic scale, from the smallest to the median, and the routers' error."""

    margins: RoutingMargins
    start: float
    width: float
    error: float


def error_growth(propagated: Mapping[str, tuple[TensorError, TensorError]]) -> ErrorGrowth | None:
    """Return the error after every sublayer, by module in forward order; None where there are fewer than two.

    Errors that are not finite are drawn at the top.
    """
    names = [name for name in propagated if _is_stage(name)]
    values = [error.rmse for name in names for error in propagated[name] if 0 < error.rmse < math.inf]
    if len(names) < 2 or not values:
        return None
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values)) + 1e-9), low + 1)

    def points(side: int) -> str:
        places = (100 - _at(propagated[name][side].rmse, low, high) for name in names)
        return " ".join(f"{100 * i / (len(names) - 1):.2f},{y:.2f}" for i, y in enumerate(places))

    step = max(1, math.ceil((high - low) / N_TICKS))
    ticks = tuple(Tick(power, 100 - _at(10.0**power, low, high)) for power in range(low, high + 1, step))
    return ErrorGrowth(points(0), points(1), ticks, names[0], names[-1])


def margin_strips(margins: Sequence[RoutingMargins]) -> list[MarginStrip]:
    """Return one strip per router."""
    return [
        MarginStrip(margin, start, max(0.5, _at(margin.median, *MARGIN_DECADES) - start), error)
        for margin in margins
        for start, error in [(_at(margin.smallest, *MARGIN_DECADES), _at(margin.error, *MARGIN_DECADES))]
    ]


def margin_ticks() -> list[Tick]:
    """Return the scale below the strips."""
    low, high = MARGIN_DECADES
    return [Tick(power, _at(10.0**power, low, high)) for power in range(low + 1, high, 2)]


def _is_stage(name: str) -> bool:
    """Return whether a module ends a sublayer or the model, not a norm inside a layer."""
    return name.endswith((".self_attn", ".mlp")) or name in ("norm", "model.norm", "lm_head")


def _at(value: float, low: int, high: int) -> float:
    """Return the place of a value between 10^low and 10^high in percent, limited to 0 to 100."""
    if not value > 0:
        return 0.0
    power = math.log10(value) if math.isfinite(value) else high
    return round(100 * min(1.0, max(0.0, (power - low) / (high - low))), 2)
