"""Fit of scaling laws to a sweep's results, written to `fits.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast, get_args

from mlx_moe.analysis.scaling import FORMULAS, Fit, LawName, Point, fit
from mlx_moe.analysis.sweep_results import read_points
from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import output_file, signature, writing
from mlx_moe.terminal import echo
from mlx_moe.training.console import Console

FITS = "fits.json"
COUNTS = ("non_embedding", "active", "total")


def fit_results(
    results: Path,
    law: str,
    parameters: str,
    resamples: int,
    level: float,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> Fit:
    """Fit a law to a sweep's finished runs, write it, and print it.

    `law` auto: L(N, D) if both vary, else the law of the one that does. Raises InputError if there are too few runs.
    """
    if law not in ("auto", *get_args(LawName)):
        raise InputError(f"--law {law!r}: must be auto, {', '.join(get_args(LawName))}")
    if parameters not in COUNTS:
        raise InputError(f"--parameters {parameters!r}: must be one of {', '.join(COUNTS)}")
    points = read_points(results, parameters)
    chosen = cast(LawName, law) if law != "auto" else _law_of(points)
    file = out or (results if os.path.isdir(results) else results.parent) / FITS
    with writing(file, FITS, "fit") as partial:
        fitted = fit(points, chosen, resamples, level, seed)
        values = {"generator": signature("fit"), "parameters": parameters, "fits": [fitted.to_json()]}
        text = json.dumps(values, indent=1) + "\n"
        partial.write_text(text, encoding="utf-8")
    if as_json:
        echo(text, nl=False)
    else:
        _show(fitted, parameters, output_file(file, FITS))
    return fitted


def _law_of(points: list[Point]) -> LawName:
    varied = {"N": len({point.n for point in points}) > 1, "D": len({point.d for point in points}) > 1}
    if all(varied.values()):
        return "ND"
    return "D" if varied["D"] else "N"


def _show(fitted: Fit, parameters: str, file: Path) -> None:
    console = Console()
    console.line(FORMULAS[fitted.law] + (f", N: {parameters} parameters" if "N" in fitted.law else ""))
    console.table(
        ["constant", "value", f"{100 * fitted.level:g} % from", "to"],
        [[name, *(f"{x:.4g}" for x in (e.value, e.low, e.high))] for name, e in fitted.constants.items()],
    )
    missed = fitted.leave_one_out_error
    console.summary(
        [
            ("runs", f"{len(fitted.points)}, {fitted.degrees_of_freedom} more than constants"),
            ("R²", f"{fitted.r_squared:.4f}"),
            ("leave-one-out error", "too few runs" if missed is None else f"{100 * missed:.2f} % of the loss"),
        ]
    )
    if (optimal := fitted.optimal_exponent) is not None:
        console.line(f"best N for C FLOPs: C^{optimal.value:.3f} ({optimal.low:.3f} to {optimal.high:.3f})")
    if fitted.degrees_of_freedom < 3:
        console.warn("with so few runs more than constants, the intervals say little; add runs")
    console.line(f"wrote {file}")
