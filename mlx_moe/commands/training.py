"""Commands to train, and to estimate what training needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_moe.commands.errors import stop
from mlx_moe.commands.options import AllowLossy, BackendOption, ConfigFile, DeviceOption, JsonOption, Overrides, Preset

if TYPE_CHECKING:
    from mlx_moe.config import RunConfig


def train(
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="A run or an architecture preset.", show_default="three-phase")
    ] = None,
    config: ConfigFile = None,
    override: Overrides = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="Number of phases to train, such as 2; with --from, the phases, such as 2,3.",
            show_default="all",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Start from a checkpoint, or a Hugging Face model by folder or name.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="stories, tinystories, or a path: .txt, .jsonl, .parquet, or a folder.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="char, bpe:VOCAB, or a Hugging Face tokenizer by name or folder.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every phase.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, batches and dropout.")] = None,
    optimizer_transfer: Annotated[
        str | None, typer.Option(help="carry or reset the optimizer's moments at boundaries.", show_default="carry")
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    allow_lossy: AllowLossy = False,
) -> None:
    """Train a model through its phases: dense, upcycled to experts, grown; every boundary is certified lossless."""
    from mlx_moe.training.request import RunRequest
    from mlx_moe.training.run import train_run
    from mlx_moe.training.stopping import TrainingStopped

    request = RunRequest(
        preset=preset,
        config=config,
        overrides=override or (),
        phases=phases,
        source=source,
        data=data,
        tokenizer=tokenizer,
        steps=steps,
        seed=seed,
        optimizer_transfer=optimizer_transfer,
        backend=backend,
        device=device,
        out=out,
        resume=resume,
        allow_lossy=allow_lossy,
    )
    try:
        train_run(request)
    except TrainingStopped as stopped:
        stop(str(stopped), stopped.exit_code)


def params(
    preset: Preset = "three-phase", config: ConfigFile = None, override: Overrides = None, as_json: JsonOption = False
) -> None:
    """Count the parameters of every phase: total, active per token, inactive, idle experts."""
    from mlx_moe.training.run_plan import show_parameters

    show_parameters(_load_run(preset, config, override or []), as_json)


def plan(
    preset: Preset = "three-phase",
    config: ConfigFile = None,
    override: Overrides = None,
    machine: Annotated[str | None, typer.Option(help="Machine to plan for, e.g. 'M2 Max 32GB'.")] = None,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Estimate every phase's memory, time and largest batch, and report where it does not fit."""
    from mlx_moe.training.run_plan import make_plan, show

    show(make_plan(_load_run(preset, config, override or []), backend, machine), as_json)


def doctor() -> None:
    """Show the device, the library versions, and what is missing."""
    from mlx_moe.commands.doctor import diagnose

    raise typer.Exit(diagnose())


def _load_run(preset: str, config: Path | None, overrides: list[str]) -> RunConfig:
    from mlx_moe.presets import load_run

    return load_run(preset, config, overrides)
