"""Train, and what to know before."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_moe.commands.ending import stop
from mlx_moe.commands.options import AllowLossy, BackendOption, ConfigFile, DeviceOption, Json, Overrides, Preset
from mlx_moe.errors import InputError

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
            help="How many phases of the run to train, such as 2; with --from those named, such as 2,3.",
            show_default="all",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="A checkpoint, or a Hugging Face model by folder or name, to train on.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="stories, tinystories, or a path: .txt, .jsonl, .parquet, or a folder.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="char, bpe:VOCAB, or a Hugging Face tokenizer by name or folder.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every phase.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and dropout.")] = None,
    optimizer_transfer: Annotated[
        str | None, typer.Option(help="carry or reset the moments at boundaries.", show_default="carry")
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    allow_lossy: AllowLossy = False,
) -> None:
    """Train: dense, upcycled to experts, grown; both boundaries proven lossless."""
    from mlx_moe.hub.models import open_model
    from mlx_moe.hub.names import find_model
    from mlx_moe.presets import as_overrides, load_run
    from mlx_moe.storage.atomic import absolute
    from mlx_moe.storage.run_folder import check_new
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.training.console import Console
    from mlx_moe.training.phases import Options
    from mlx_moe.training.phases import train as run_phases
    from mlx_moe.training.resume import resume_run
    from mlx_moe.training.start import start_from
    from mlx_moe.training.stopping import TrainingStopped

    named = None if phases is None else _phases(phases)
    shortcuts = {"data.source": data, "data.tokenizer": tokenizer, "seed": seed}
    shortcuts |= {"optimizer.transfer": optimizer_transfer}
    overrides = as_overrides({key: value for key, value in shortcuts.items() if value is not None})
    if resume is not None:
        given: dict[str, object]
        given = {"--preset": preset, "--config": config, "-o": override, "--from": source, "--out": out, "--data": data}
        given |= {"--tokenizer": tokenizer, "--steps": steps, "--seed": seed}
        given |= {"--optimizer-transfer": optimizer_transfer}
        if named_too := [option for option, value in given.items() if value is not None]:
            raise InputError(f"--resume takes the run as it is; leave out {', '.join(named_too)}")
        absolute(resume)
        directory = resume.expanduser()
        resumed = resume_run(directory, backend, device, allow_lossy, has_phases=named is not None)
        run, chosen, options = resumed.run, resumed.backend, resumed.options
        last_phase = _last_phase(named, run, "") if named else resumed.last_phase
    else:
        chosen = choose_backend(backend)
        layers = "three-phase" if preset is None else preset, config, [*overrides, *(override or [])]
        if source is None:
            run = load_run(*layers, steps=steps)
        elif named is None:
            raise InputError(
                f"--from {source}: name the phases to run, such as --phases 2 or --phases 2,3, out of "
                f"{_listed(load_run(*layers))}"
            )
        else:
            run = start_from(open_model(find_model(source)), named, *layers, steps=steps)
        directory = out or Path("runs") / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}"
        absolute(directory)
        directory = directory.expanduser()
        check_new(directory)
        if out is None and chosen.connect().size > 1:
            raise InputError(f"{chosen.connect().size} processes need one folder between them; name it with --out")
        last_phase = _last_phase(named, run, ", or name a model to start from: --from MODEL")
        options = Options(device, allow_lossy, is_new=True)
    console = Console(quiet=chosen.connect().rank > 0)
    try:
        run_phases(run, directory, chosen, last_phase, replace(options, open_model=open_model), console)
    except TrainingStopped as stopped:
        stop(str(stopped), stopped.exit_code)


def params(
    preset: Preset = "three-phase", config: ConfigFile = None, override: Overrides = None, as_json: Json = False
) -> None:
    """Count the parameters of every phase: total, active per token, inactive, idle experts."""
    from mlx_moe.training.planning import show_parameters

    show_parameters(_load_run(preset, config, override or []), as_json)


def plan(
    preset: Preset = "three-phase",
    config: ConfigFile = None,
    override: Overrides = None,
    machine: Annotated[str | None, typer.Option(help="Instead of this one, e.g. 'M2 Max 32GB'.")] = None,
    backend: BackendOption = "auto",
    as_json: Json = False,
) -> None:
    """Estimate every phase's memory, time and largest batch, and say where it will not fit."""
    from mlx_moe.training.planning import make_plan, show

    show(make_plan(_load_run(preset, config, override or []), backend, machine), as_json)


def doctor() -> None:
    """Show the device, the versions, and what is missing."""
    from mlx_moe.training.doctor import diagnose

    raise typer.Exit(diagnose())


def _phases(text: str) -> list[int]:
    """Read numbers of phases: `3`, or some in a row such as `2,3`."""
    phases = [int(number) for number in text.split(",") if re.fullmatch(r"[1-9][0-9]?", number)]
    if len(phases) != len(text.split(",")) or phases != list(range(phases[0], phases[-1] + 1)):
        raise InputError(f"--phases {text}: must be the number of a phase, from 1, or some in a row, such as 2,3")
    return phases


def _listed(run: RunConfig) -> str:
    """List the phases of a run: `1 dense, 2 moe (upcycle)`."""
    transfers = [f" ({config.transfer})" if config.transfer else "" for config in run.phases.values()]
    names = zip(run.phases, transfers, strict=True)
    return ", ".join(f"{number} {name}{transfer}" for number, (name, transfer) in enumerate(names, start=1))


def _last_phase(named: list[int] | None, run: RunConfig, alternative: str) -> int:
    """One number by itself stands for all phases up to it."""
    if named is None:
        return run.last_phase
    if named[-1] > len(run.phases):
        raise InputError(
            f"--phases {','.join(map(str, named))}: there is no phase {named[-1]}; the run has {_listed(run)}"
        )
    if named[-1] < run.first_phase or (len(named) > 1 and named[0] != run.first_phase):
        raise InputError(
            f"--phases {','.join(map(str, named))}: the run begins with phase {run.first_phase}; take --phases "
            f"{max(named[-1], run.first_phase)}{alternative}"
        )
    return named[-1]


def _load_run(preset: str, config: Path | None, overrides: list[str]) -> RunConfig:
    from mlx_moe.presets import load_run

    return load_run(preset, config, overrides)
