"""Compare backends and libraries, and export with a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_moe.commands.options import CheckpointArgument, JsonOption, OutArgument, Seed


def parity(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face folder; without one, small fresh models.", show_default=False
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Any Hugging Face folder: mlx-lm against transformers instead.", show_default=False),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", "-p", help="Architectures to compare.", show_default="all")
    ] = None,
    seed: Seed = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also put known faults in, and check that they are found.")
    ] = False,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.", show_default=False)] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that opens without a network.", show_default=False)
    ] = None,
) -> None:
    """Compare MLX and PyTorch with a float64 model, and across boundaries. Exit 0: agree, 1: differ, 2: not judged."""
    from parity.run import ParityRequest, run_and_write

    request = ParityRequest(checkpoint, model, tuple(preset or []), seed, self_test)
    raise typer.Exit(run_and_write(request, as_json, out, html))


def export(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    format: Annotated[
        str,
        typer.Option(
            help="auto (or mlx) takes the one that holds the model, of llama, qwen2, qwen3, mixtral, qwen3_moe, "
            "granitemoe, granitemoehybrid and gpt2."
        ),
    ] = "auto",
    verify: Annotated[
        bool, typer.Option(help="Compare the logits of transformers and mlx-lm, where installed.")
    ] = True,
) -> None:
    """Write a model that transformers and mlx-lm open as it is, and that gives the same logits there."""
    from parity.export_check import export_checked

    export_checked(checkpoint, out, format, verify)
