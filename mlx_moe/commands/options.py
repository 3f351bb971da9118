"""Arguments and options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_NEW_TOKENS, MAX_SEED, MAX_VOCAB_SIZE

DEVICES = ("auto", "cpu", "gpu", "cuda", "mps")  # the last two are PyTorch's names

Preset = Annotated[str, typer.Option("--preset", "-p", help="A run or an architecture preset.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="A YAML or JSON file over the preset.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="key.path=value over everything else; repeatable.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, mlx or torch.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
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


def _in_range(name: str) -> Callable[[float], float]:
    """A callback that lets `Sampling` say what is out of range, before anything is loaded."""

    def check(value: float) -> float:
        from mlx_moe.inference.sampling import Sampling  # loads NumPy, which other commands need not

        values: dict[str, Any] = {name: value}
        Sampling(**values)
        return value

    return check


Temperature = Annotated[
    float,
    typer.Option("--temperature", callback=_in_range("temperature"), help="0: always the likeliest token."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=1, max=MAX_VOCAB_SIZE, help="Draw from the k likeliest tokens only.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        callback=_in_range("top_p"),
        help="Draw from the fewest likeliest tokens whose probabilities sum to p; 1: from all.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        callback=_in_range("min_p"),
        help="Draw from tokens at least p times as likely as the likeliest; 0: from all.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        callback=_in_range("repetition_penalty"),
        help="Above 1: tokens that stand in the text already become less likely.",
    ),
]


def _level(value: float) -> float:
    if not 0.5 <= value <= 0.999:
        raise InputError(f"--level {value}: must be from 0.5 to 0.999")
    return value


Level = Annotated[float, typer.Option("--level", callback=_level, help="Confidence level of the intervals.")]
