"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_NEW_TOKENS, MAX_SEED

DEVICES = ("auto", "cpu", "gpu", "cuda", "mps")  # the last two are PyTorch's names

Preset = Annotated[str, typer.Option("--preset", "-p", help="A run or an architecture preset.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML or JSON file over the preset.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="key.path=value over everything else; repeatable.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, mlx or torch.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AllowLossy = Annotated[bool, typer.Option("--allow-lossy", help="Accept a transfer that changes the model.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint, a run, RUN/best, or a Hugging Face folder.", show_default=False)
]
OutArgument = Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of all random numbers.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, max=MAX_NEW_TOKENS)]


def _device(value: str) -> str:
    if value not in DEVICES:  # before anything is loaded
        raise InputError(f"--device {value!r}: must be one of {', '.join(DEVICES)}")
    return value


DeviceOption = Annotated[str, typer.Option("--device", callback=_device, help="auto, cpu or gpu.")]


def _temperature(value: float) -> float:
    if not (value == 0 or 1e-3 <= value <= 1e3):
        raise InputError(f"--temperature {value}: must be 0, for always the likeliest token, or from 0.001 to 1000")
    return value


Temperature = Annotated[
    float, typer.Option("--temperature", callback=_temperature, help="Sampling temperature; 0: greedy.")
]


def _level(value: float) -> float:
    if not 0.5 <= value <= 0.999:
        raise InputError(f"--level {value}: must be from 0.5 to 0.999")
    return value


Level = Annotated[float, typer.Option("--level", callback=_level, help="Confidence level of the intervals.")]
