"""Drawings in a page: inline SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

Json = dict[str, Any]


def error_growth(propagated: dict[str, Json], names_of: tuple[str, str]) -> str:
    """RMSE over depth, on a logarithmic scale, at what every block adds to the residual stream and at the end."""
    names = [
        name
        for name in propagated
        if name.endswith((".self_attn", ".mlp")) or name in ("norm", "lm_head", "model.norm")
    ]
    series = [[number(propagated[name][side]["rmse"]) for name in names] for side in ("mlx", "torch")]
    values = [value for line in series for value in line if 0 < value < math.inf]
    if len(names) < 2 or not values:
        return ""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def x(i: int) -> float:
        return 46 + i * 640 / (len(names) - 1)

    def y(value: float) -> float:
        return 150 - 130 * (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)

    grid = "".join(
        f'<line x1="46" x2="690" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}" stroke="var(--line)"/>'
        f'<text x="40" y="{y(10.0**e) + 4:.1f}" text-anchor="end">1e{e}</text>'
        for e in range(low, high + 1, max(1, (high - low) // 5))
    )
    lines = "".join(
        f'<polyline fill="none" stroke="var(--{colour})" stroke-width="2" '
        f'points="{" ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line))}"/>'
        for line, colour in zip(series, ("one", "other"), strict=True)
    )
    first, last = escape(names[0]), escape(names[-1])
    labels = f'<text x="46" y="168">{first}</text><text x="690" y="168" text-anchor="end">{last}</text>'
    keys = ", ".join(_key(colour, name) for colour, name in zip(("one", "other"), names_of, strict=True))
    return (
        f'<figure><svg viewBox="0 0 700 175" role="img">{grid}{lines}{labels}</svg><figcaption>RMSE over depth, '
        f"each module fed what came so far: {keys}</figcaption></figure>"
    )


def routing_margins(layers: Sequence[tuple[float | None, ...]]) -> str:
    """Per layer on a logarithmic scale: the routers' errors, and the smallest and the median margin."""
    if not layers:
        return ""
    low, high, height = -9, 1, 22 * len(layers) + 24

    def x(value: float | None) -> float:
        return 70 + 610 * (min(max(math.log10(max(number(value), 1e-30)), low), high) - low) / (high - low)

    rows = "".join(
        f'<text x="60" y="{22 * i + 16}" text-anchor="end">layer {i}</text>'
        f'<line x1="{x(smallest):.1f}" x2="{x(median):.1f}" y1="{22 * i + 12}" y2="{22 * i + 12}" stroke="var(--one)" '
        f'stroke-width="8"/><circle cx="{x(error):.1f}" cy="{22 * i + 12}" r="4" fill="var(--other)"/>'
        for i, (smallest, median, error) in enumerate(layers)
    )
    scale = "".join(
        f'<text x="{x(10.0**e):.1f}" y="{height - 4}" text-anchor="middle">1e{e}</text>' for e in range(low, 2, 2)
    )
    return (
        f'<figure><svg viewBox="0 0 700 {height}" role="img">{rows}{scale}</svg><figcaption>Routing: margins of '
        f"the last expert chosen, {_key('one', 'smallest to median')}; {_key('other', 'the routers’ errors')}, "
        "which alone excuse another choice</figcaption></figure>"
    )


def _key(colour: str, text: str) -> str:
    return f'<span style="color: var(--{colour})">■</span> {escape(text)}'


def number(value: float | None) -> float:
    """What was not finite is null in JSON."""
    return math.inf if value is None else value
