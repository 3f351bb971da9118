"""Do something with a checkpoint: transfer it, run it, bring it in."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_moe.commands.errors import stop
from mlx_moe.commands.options import (
    AllowLossy,
    BackendOption,
    CheckpointArgument,
    DeviceOption,
    MinP,
    NewTokens,
    OutArgument,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from mlx_moe.limits import MAX_D_FF, MAX_D_MODEL, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS
from mlx_moe.terminal import echo, has_reader

if TYPE_CHECKING:
    from mlx_moe.config import ModelConfig
    from mlx_moe.storage.checkpoint import Checkpoint
    from mlx_moe.transfer.plan import Plan


def upcycle(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    experts: Annotated[int, typer.Option(min=1, max=MAX_EXPERTS, help="Copies of the FFN in a layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, max=MAX_EXPERTS, help="Copies that a token visits.")] = 2,
    every: Annotated[int, typer.Option(min=1, max=MAX_LAYERS, help="Experts in every n-th layer only.")] = 1,
    granularity: Annotated[int, typer.Option(min=1, max=MAX_EXPERTS, help="Cut every copy into so many experts.")] = 1,
    shared: Annotated[bool, typer.Option("--shared", help="One more copy, for every token.")] = False,
    router: Annotated[str, typer.Option(help="random, zero, or centroids of a --text.")] = "random",
    text: Annotated[str | None, typer.Option(help="For centroids: text, JSONL or Parquet.", metavar="FILE")] = None,
    noise: Annotated[float, typer.Option(help="On each expert, relative to a tensor's std; lossy.")] = 0.0,
    drop: Annotated[float, typer.Option(help="Share of its neurons that each expert draws anew; lossy.")] = 0.0,
    seed: Seed = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    allow_lossy: AllowLossy = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts that computes the same, unless noise or drop is asked for."""
    from mlx_moe.config import UpcyclePhaseConfig
    from mlx_moe.convert.transfers import Request, upcycle_model
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.transfer.upcycling import ZERO_ROUTER_WARNING
    from mlx_moe.validation import validate

    options = {"n_experts": experts, "top_k": top_k, "every": every, "granularity": granularity, "shared": shared}
    phase = validate(UpcyclePhaseConfig, options | {"router_init": router, "noise": noise, "drop": drop})
    if router == "zero":
        echo(f"warning: {ZERO_ROUTER_WARNING}", err=True)
    request = Request(checkpoint, out, choose_backend(backend), device, allow_lossy)
    if not upcycle_model(request, phase, seed, text):
        _nothing_written()


def grow(
    checkpoint: CheckpointArgument,
    out: OutArgument,
    d_model: Annotated[
        int | None, typer.Option(min=2, max=MAX_D_MODEL, help="The new width.", show_default="as it is")
    ] = None,
    n_layers: Annotated[
        int | None, typer.Option(min=1, max=MAX_LAYERS, help="The new depth.", show_default="as it is")
    ] = None,
    n_heads: Annotated[int | None, typer.Option(min=1, max=MAX_HEADS, show_default="grows with the width")] = None,
    d_ff: Annotated[int | None, typer.Option(min=1, max=MAX_D_FF, show_default="grows with the width")] = None,
    split: Annotated[
        str, typer.Option(help="uneven or even shares for copies; even ones stay equal for ever.")
    ] = "uneven",
    seed: Seed = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    allow_lossy: AllowLossy = False,
) -> None:
    """Make a checkpoint wider and deeper; it computes the same."""
    from mlx_moe.config import GrowPhaseConfig
    from mlx_moe.convert.transfers import Request, transfer_model
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.transfer.growth import grow_config, plan_growth
    from mlx_moe.validation import validate

    phase = validate(GrowPhaseConfig, {"split": split})

    def target(model: ModelConfig) -> ModelConfig:
        size = {"d_model": d_model or model.d_model, "n_layers": n_layers or model.n_layers}
        return grow_config(model, **size, n_heads=n_heads, d_ff=d_ff)

    def plan(source: Checkpoint, grown: ModelConfig) -> Plan:
        return plan_growth(source.config, grown, phase.split, seed)

    request = Request(checkpoint, out, choose_backend(backend), device, allow_lossy)
    if not transfer_model(request, target, plan):
        _nothing_written()


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")] = "Once upon a time",
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Continue a text with a checkpoint of either backend."""
    from mlx_moe.hub.models import open_model
    from mlx_moe.inference.decoding import encode_prompt, load_tokenizer, stream_generate
    from mlx_moe.inference.sampling import Sampling
    from mlx_moe.training.backend import choose_backend

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    chosen, loaded = choose_backend(backend), open_model(checkpoint)
    tokenizer = load_tokenizer(loaded)
    encode_prompt(tokenizer, prompt)  # what is wrong with it is said before the weights are read
    trainer = chosen.trainer(loaded.config, loaded.weights, device=device)
    pieces = stream_generate(trainer, tokenizer, prompt, max_new_tokens, sampling)
    first = list(islice(pieces, 1))  # what is wrong with the weights is said here, and nothing before
    echo(f"backend: {chosen.reason}", err=True)
    echo(prompt, nl=False)
    for piece in chain(first, pieces):
        echo(piece, nl=False)
        if not has_reader():
            return
    echo()


def import_(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a name on the hub.", show_default=False)],
    out: OutArgument,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Take weights that hold NaN or Inf, too.")
    ] = False,
) -> None:
    """Turn a Hugging Face model (Llama, Mistral, Qwen, GPT-2, Mixtral and others) into a checkpoint."""
    from mlx_moe.convert.importing import import_model

    import_model(model, out, allow_nonfinite)


def _nothing_written() -> None:
    stop("the transfer changed the model, so nothing was written; write it nevertheless with --allow-lossy", 1)
