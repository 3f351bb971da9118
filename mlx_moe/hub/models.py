"""Models wherever they come from: a checkpoint of ours, or Hugging Face's folder in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_moe.accounting import count_parameters
from mlx_moe.config import DataConfig, ModelConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.data.sources import open_source
from mlx_moe.data.stories import story
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.data.tokens import fixed_windows
from mlx_moe.errors import InputError, brief_name
from mlx_moe.hub.config_in import read_config
from mlx_moe.hub.foreign import ADAPTER, read_settings
from mlx_moe.hub.layout import find, unpack
from mlx_moe.hub.names import find_model, model_name
from mlx_moe.hub.sizes import check_room
from mlx_moe.parameters import Weights
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.storage.reading import is_folder, own_file
from mlx_moe.storage.tensor_files import StoredWeights, check_finite, open_tensors
from mlx_moe.training.backend import Backend, Tokens
from mlx_moe.training.boundary import (
    ChangedModel,
    centroid_routers,
    centroid_tokens,
    random_probes,
    transfer_checkpoint,
)
from mlx_moe.training.console import Console
from mlx_moe.transfer.experts import experts_of
from mlx_moe.transfer.plan import Plan
from mlx_moe.transfer.upcycling import LOSSY_METHOD, plan_phase
from mlx_moe.validation import validate

PROBE_TOKENS = 64
WINDOW_TOKENS = 256  # of the text that centroids are taken of
ORIGIN = "huggingface"  # stands for the backend where none of ours trained the weights


def open_model(path: Path) -> Checkpoint:
    """A checkpoint, a run's latest or best one, or a model in Hugging Face's folder.

    Raises InputError where it is missing, damaged, or not a model that our config can describe.
    """
    check_place(path)
    if not is_model_folder(path):
        return checkpoint.load(path)
    config, weights = read_model(path)
    return Checkpoint(path, config, _state(path, config), weights)


def check_place(path: Path) -> None:
    """Raise InputError where a path names no folder, and not the best checkpoint of one."""
    if not is_folder(path) and not (path.name == "best" and is_folder(path.parent)):
        raise InputError(f"no checkpoint at {brief_name(str(path), limit=400)}: there is no such folder")


def with_finite_weights(source: Checkpoint, remedy: str = "get the model anew") -> Checkpoint:
    """The same model; InputError, which names the tensor, when one is first fetched that holds NaN or Inf."""
    checked: set[str] = set()

    def read(name: str) -> NDArray[np.float32]:
        array = source.weights[name]
        if name not in checked:
            check_finite(name, array, source.path, remedy)
            checked.add(name)
        return array

    return replace(source, weights=StoredWeights(source.weights, read))


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like Hugging Face's, and not like a checkpoint or a run."""
    if not os.path.isdir(path):
        return False
    if any((path / name).is_file() for name in (checkpoint.MANIFEST, checkpoint.STATE, "config.yaml")):
        return False
    if any((path / name).is_file() for name in (checkpoint.CONFIG, ADAPTER)):
        return True
    return any(path.glob("*.safetensors")) or any(path.glob("*.bin"))


def read_model(folder: Path) -> tuple[ModelConfig, Weights]:
    """The architecture and float32 weights of a model in Hugging Face's folder; InputError where they do not fit."""
    if not is_folder(folder):
        raise InputError(f"no model at {brief_name(str(folder), limit=400)}: there is no such folder")
    read_settings(folder)  # before the weights: what has no config.json, or brings code, is no model
    tensors = open_tensors(folder)
    family, config = read_config(folder, tensors)
    return config, unpack(find(folder, tensors, family, config), config)


def probe_tokens(source: Checkpoint, n: int) -> Tokens:
    """(n, T + 1) tokens of stories where the model has a tokenizer that knows their words, else random ones.

    Random tokens take a published model to where rounding alone moves its logits far, and a certificate says little
    there; so do long texts (SmolLM2-135M, whose logits reach 42, upcycled, float32: 3e-3 in 1,024 random tokens,
    1.4e-4 in 256 of text, under 9e-5 in 64).
    """
    random_BT1 = random_probes(source.config, n)[:, : PROBE_TOKENS + 1]
    if source.tokenizer_folder is None:
        return random_BT1
    tokenizer, ids = Tokenizer.load(source.tokenizer_folder), list[int]()
    for number in count():
        ids += [*tokenizer.encode(story(number)), tokenizer.eot_id]
        if len(ids) >= random_BT1.size:
            break
    fits = max(ids) < source.config.vocab_size and len(set(ids)) >= min(32, source.config.vocab_size // 4)
    return np.array(ids[: random_BT1.size], np.int32).reshape(random_BT1.shape) if fits else random_BT1


def import_model(name: str, out: Path, allow_nonfinite: bool = False) -> None:
    """Write a model of Hugging Face's, by folder or name on the hub, as a checkpoint, with its tokenizer.

    Raises InputError where `out` exists or is being written, and, without `allow_nonfinite`, for NaN or Inf.
    """
    with creating(out) as partial:
        folder, console = find_model(name), Console()
        if os.path.isfile(folder / checkpoint.MANIFEST):
            raise InputError(f"{folder} is a checkpoint already; use it as it is")
        config, weights = read_model(folder)
        check_room(out, config)
        source = Checkpoint(folder, config, _state(folder, config), weights)
        if not allow_nonfinite:
            source = with_finite_weights(source, "get the model anew; --allow-nonfinite takes it as it is")
        tokenizer = folder if own_file(folder, "tokenizer.json") else None
        if tokenizer is None:
            console.warn(f"{folder} has no tokenizer.json; the checkpoint is without a tokenizer")
        elif (size := Tokenizer.load(folder).vocab_size) > config.vocab_size:
            raise InputError(f"{folder}: tokenizer.json has {size} tokens, the model only {config.vocab_size}")
        checkpoint.fill(partial, config, source.state, lambda name: [source.weights[name]], tokenizer)
    console.parameters(count_parameters(config), config.display_name)
    console.line(f"wrote {out}")


def _state(folder: Path, config: ModelConfig) -> TrainerState:
    return TrainerState(2 if config.moe else 1, 0, ORIGIN, lineage=(model_name(folder),))


def text_tokens(source: Checkpoint, text: str, n: int) -> Tokens:
    """(B, T) tokens of a text, about n where it has as many; T is the context, at most WINDOW_TOKENS.

    Raises InputError where the text cannot be had, or the model has no tokenizer for it.
    """
    if source.tokenizer_folder is None:
        raise InputError(f"{source.path} has no tokenizer to read {text} with; take --router random")
    tokenizer, ids = Tokenizer.load(source.tokenizer_folder), list[int]()
    width = min(source.config.context_length, WINDOW_TOKENS)
    for document in open_source(validate(DataConfig, {"source": text, "n_documents": None})).documents():
        ids += [*tokenizer.encode(document), tokenizer.eot_id]
        if len(ids) > n + n // width + width:
            break
    if max(ids) >= source.config.vocab_size:
        raise InputError(f"{source.path}: {text} has token {max(ids)}, the model only {source.config.vocab_size}")
    width = min(width, len(ids) - 1)
    return fixed_windows(np.array(ids), -(-n // width), width)[:, :-1]


@dataclass(frozen=True)
class Request:
    """A transfer that a command asks for: from where to where, and how it is computed and judged."""

    path: Path
    out: Path
    backend: Backend
    device: str
    allow_lossy: bool


def upcycle_model(request: Request, phase: UpcyclePhaseConfig, seed: int, text: str | None) -> bool:
    """`transfer_model` to the experts that a phase asks for; their routers' centroids are those of a text."""
    if (phase.router_init == "centroids") != (text is not None):
        raise InputError("--router centroids and --text FILE go together: clusters are of the model's states on a text")

    def target(config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"moe": experts_of(config, phase)})

    def plan(source: Checkpoint, _: ModelConfig) -> Plan:
        routers = None
        if text is not None:
            tokens_BT = text_tokens(source, text, centroid_tokens(phase))
            model = request.backend.streamed(source.config, source.weights, request.device)
            routers = centroid_routers(model, phase, tokens_BT, seed)
        return plan_phase(source.config, phase, seed, routers)

    return transfer_model(request, target, plan)


def transfer_model(
    request: Request,
    target: Callable[[ModelConfig], ModelConfig],
    plan: Callable[[Checkpoint, ModelConfig], Plan],
) -> bool:
    """Apply a plan to a model, certify and write it; whether it was written. One that is lossy on purpose always is."""
    console, limits, device = Console(), VerificationConfig(), request.device
    console.line(f"backend: {request.backend.reason}")
    try:
        with creating(request.out) as partial:
            source = with_finite_weights(open_model(request.path))
            config = target(source.config)
            check_room(request.out, config)
            made = plan(source, config)
            names = f"{source.config.display_name} -> {config.display_name}"
            allow_lossy = request.allow_lossy or made.is_lossy
            probes_BT1 = probe_tokens(source, limits.probe_sequences)
            transfer = transfer_checkpoint(
                source, made, partial, request.backend, device, limits, allow_lossy, probes_BT1
            )
    except ChangedModel as changed:
        console.boundary(names, changed.certificate)
        return False
    console.boundary(names, transfer.certificate)
    console.parameters(count_parameters(config), config.display_name)
    console.line(
        f"wrote {request.out}: {transfer.bytes_written / 1e9:.2f} GB in "
        f"{transfer.seconds - transfer.seconds_certified:.1f} s, certified in {transfer.seconds_certified:.1f} s"
    )
    if made.is_lossy:
        console.line(LOSSY_METHOD)
    return True
