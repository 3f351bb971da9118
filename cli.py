"""The `mlxmoe` command. Each command parses, calls one function and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mlx_moe.errors import InputError

if TYPE_CHECKING:
    from mlx_moe.config import ModelConfig, RunConfig
    from mlx_moe.transfer.plan import Plan

app = typer.Typer(
    help="Train a small language model, upcycle it to a mixture of experts, grow it: no loss spike, MLX or PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="A run or an architecture preset.", show_default="three-phase")
    ] = None,
    config: ConfigFile = None,
    override: Overrides = None,
    phases: Annotated[int, typer.Option(help="1: dense, 2: then experts, 3: then larger experts.")] = 3,
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
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    allow_lossy: AllowLossy = False,
) -> None:
    """Train: dense, upcycled to experts, grown; both boundaries proven lossless."""
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.training.console import Console
    from mlx_moe.training.phases import Options, open_run
    from mlx_moe.training.phases import train as run_phases
    from mlx_moe.training.stopping import TrainingStopped

    if phases not in (1, 2, 3):
        raise InputError(f"--phases {phases}: must be 1 (dense), 2 (then experts) or 3 (then larger experts)")
    shortcuts = {"data.source": data, "data.tokenizer": tokenizer, "seed": seed}
    shortcuts |= {"optimizer.transfer": optimizer_transfer}
    if steps is not None:
        shortcuts |= {f"phases.{phase}.steps": steps for phase in ("dense", "moe", "large_moe")}
    overrides = [f"{key}={json.dumps(value)}" for key, value in shortcuts.items() if value is not None]
    chosen = choose_backend(backend)
    if resume is not None and (preset or config or overrides or override or out):
        raise InputError("--resume goes on with the run as it is; leave out --preset, --config, --out and the rest")
    if resume is None:
        run = _load_run(preset or "three-phase", config, [*overrides, *(override or [])])
        directory = out or Path("runs") / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}"
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise InputError(f"{directory} is not empty; name another folder, or go on with it: --resume {directory}")
    world = chosen.connect()
    if resume is not None:
        run, directory = open_run(resume, world), resume
    elif out is None and world.size > 1:
        raise InputError(f"{world.size} processes need one folder between them; name it with --out")
    try:
        run_phases(run, directory, chosen, phases, Options(device, allow_lossy), Console(quiet=world.rank > 0))
    except TrainingStopped as stopped:
        _stop(str(stopped), stopped.exit_code)


@app.command()
def params(
    preset: Preset = "three-phase", config: ConfigFile = None, override: Overrides = None, as_json: Json = False
) -> None:
    """Count the parameters of every phase: total, active per token, inactive, idle experts."""
    from mlx_moe.training.planning import show_parameters

    show_parameters(_load_run(preset, config, override or []), as_json)


@app.command()
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


@app.command()
def upcycle(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    experts: Annotated[int, typer.Option(min=1, help="Experts in every layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 2,
    router: Annotated[str, typer.Option(help="random or zero.")] = "random",
    seed: int = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    allow_lossy: AllowLossy = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts that computes the same."""
    from mlx_moe.config import UpcyclePhaseConfig
    from mlx_moe.transfer.upcycling import ZERO_ROUTER_WARNING, plan_upcycling
    from mlx_moe.validation import validate

    moe = validate(UpcyclePhaseConfig, {"n_experts": experts, "top_k": top_k, "router_init": router})
    if router == "zero":
        typer.echo(f"warning: {ZERO_ROUTER_WARNING}", err=True)
    _transfer(
        checkpoint, out, backend, device, allow_lossy,
        lambda model: plan_upcycling(model, moe.moe, moe.router_init, moe.router_std, seed),
    )  # fmt: skip


@app.command()
def grow(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    d_model: Annotated[int | None, typer.Option(min=2, help="The new width.", show_default="as it is")] = None,
    n_layers: Annotated[int | None, typer.Option(min=1, help="The new depth.", show_default="as it is")] = None,
    n_heads: Annotated[int | None, typer.Option(min=1, show_default="grows with the width")] = None,
    d_ff: Annotated[int | None, typer.Option(min=1, show_default="grows with the width")] = None,
    split: Annotated[
        str, typer.Option(help="uneven or even shares for copies; even ones stay equal for ever.")
    ] = "uneven",
    seed: int = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    allow_lossy: AllowLossy = False,
) -> None:
    """Make a checkpoint wider and deeper; it computes the same."""
    from mlx_moe.config import GrowPhaseConfig
    from mlx_moe.transfer.growth import grow_config, plan_growth
    from mlx_moe.validation import validate

    phase = validate(GrowPhaseConfig, {"split": split})
    _transfer(
        checkpoint, out, backend, device, allow_lossy,
        lambda model: plan_growth(
            model,
            grow_config(
                model, d_model=d_model or model.d_model, n_layers=n_layers or model.n_layers, n_heads=n_heads, d_ff=d_ff
            ),
            phase.split,
            seed,
        ),
    )  # fmt: skip


@app.command()
def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens only.")] = None,
    seed: int = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Continue a text with a checkpoint of either backend."""
    from mlx_moe.hub.models import open_model
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.training.generation import continue_text

    chosen, loaded = choose_backend(backend), open_model(checkpoint)
    typer.echo(f"backend: {chosen.reason}", err=True)
    sampling = {"temperature": temperature, "top_k": top_k, "seed": seed}
    for piece in continue_text(loaded, prompt, chosen, device, max_new_tokens, **sampling):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def parity(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face folder; without one, small fresh models.", show_default=False
        ),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", "-p", help="Architectures to compare.", show_default="all")
    ] = None,
    seed: int = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Put known faults in, and see that they are found.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare MLX and PyTorch with a float64 model, and across boundaries. Exit 0: same, 1: differs, 2: not judged."""
    from parity.report import report

    raise typer.Exit(report(checkpoint, preset or [], seed, self_test, as_json))


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder.", show_default=False)], out: OutArgument
) -> None:
    """Turn a Hugging Face model (Llama, Mistral, Mixtral, GPT-2) into a checkpoint."""
    from mlx_moe.hub.models import import_model

    import_model(folder, out)


@app.command()
def export(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    format: Annotated[str, typer.Option(help="auto, llama, mixtral or gpt2.")] = "auto",
    verify: Annotated[
        bool, typer.Option(help="Compare the logits of transformers and mlx-lm, where installed.")
    ] = True,
) -> None:
    """Write a model that transformers and mlx-lm open as it is, and that gives the same logits there."""
    from parity.export_check import export_checked

    export_checked(checkpoint, out, format, verify)


@app.command()
def doctor() -> None:
    """Show the device, the versions, and what is missing."""
    from mlx_moe.training.doctor import diagnose

    raise typer.Exit(diagnose())


def main() -> None:
    """Run the command. Bad input is one line and exit code 2."""
    try:
        app(prog_name="mlxmoe")
    except InputError as error:
        _stop(str(error), 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _stop(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"error: {message}" if exit_code < 128 else message, err=True)
    sys.exit(exit_code)


def _load_run(preset: str, config: Path | None, overrides: list[str]) -> RunConfig:
    from mlx_moe.presets import load_run

    return load_run(preset, config, overrides)


def _transfer(
    checkpoint: Path, out: Path, backend: str, device: str, allow_lossy: bool, plan: Callable[[ModelConfig], Plan]
) -> None:
    from mlx_moe.hub.models import transfer_model
    from mlx_moe.training.backend import choose_backend

    if not transfer_model(checkpoint, out, choose_backend(backend), device, allow_lossy, plan):
        _stop("the transfer changed the model, so nothing was written; --allow-lossy writes it all the same", 1)


if __name__ == "__main__":
    main()
