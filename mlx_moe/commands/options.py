"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str, typer.Option("--preset", "-p", help="A run or an architecture preset.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML or JSON file over the preset.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="key.path=value over everything else; repeatable.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, mlx or torch.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or gpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AllowLossy = Annotated[bool, typer.Option("--allow-lossy", help="Go on after a boundary that changed the model.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint, a run, RUN/best, or a Hugging Face folder.", show_default=False)
]
OutArgument = Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)]
