"""Commands that inspect a run: its experts, its curves, a page about all of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_moe.commands.options import BackendOption, DeviceOption
from mlx_moe.extras import require
from mlx_moe.limits import MAX_BATCH_SIZE
from mlx_moe.terminal import echo

RunArgument = Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]


def experts(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="RUN/experts.json")] = None,
    sequences: Annotated[
        int, typer.Option(min=1, max=MAX_BATCH_SIZE, help="Validation sequences, each as long as the context.")
    ] = 64,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Analyse the experts of a run's checkpoints: load, twins, and the tokens routed to each."""
    from mlx_moe.analysis.experts import report_experts
    from mlx_moe.analysis.run_reader import EXPERTS_FILE
    from mlx_moe.training.backend import choose_backend

    report_experts(run, out or run / EXPERTS_FILE, choose_backend(backend), device, sequences)


def plot(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a sweep's.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="PATH/plots")] = None,
) -> None:
    """Draw a run's curves and its experts' load, or a sweep and its scaling law, as SVG and PNG."""
    require("matplotlib", "mlxmoe plot")
    os.environ["MPLBACKEND"] = "agg"  # matplotlib fails on unknown backends; figures go to files
    import logging

    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # the location of its font cache does not concern users

    for name in ("MPLCONFIGDIR", "MATPLOTLIBRC"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.environ[name])
    with contextlib.chdir(Path(__file__).parent):  # matplotlib reads settings from the working folder
        from mlx_moe.analysis.plots import plot as draw

    for file in draw(path, out, _warn):
        echo(file)


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="RUN/report.html")] = None,
) -> None:
    """Write one HTML page about a run, which opens in any browser without a network."""
    from mlx_moe.analysis.report import write_report

    echo(write_report(run, out or run / "report.html", _warn))


def _warn(line: str) -> None:
    echo(f"warning: {line}", err=True)
