"""Models wherever they come from: a checkpoint of ours, or Hugging Face's folder in its place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.config import DataConfig, ModelConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.data.sources import open_source
from mlx_moe.data.stories import story
from mlx_moe.data.tokenizers import Tokenizer
from mlx_moe.data.tokens import fixed_windows
from mlx_moe.errors import InputError
from mlx_moe.hub.config_in import read_config
from mlx_moe.hub.layout import find, unpack
from mlx_moe.hub.names import model_name
from mlx_moe.parameters import Weights
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.storage.tensor_files import open_tensors
from mlx_moe.training.backend import Backend, Tokens
from mlx_moe.training.boundary import centroid_routers, centroid_tokens, random_probes, transfer_checkpoint
from mlx_moe.training.console import Console
from mlx_moe.transfer.plan import Plan
from mlx_moe.transfer.upcycling import LOSSY_METHOD, plan_phase

PROBE_TOKENS = 64
WINDOW_TOKENS = 256  # of the text that centroids are taken of
ORIGIN = "huggingface"  # stands for the backend where none of ours trained the weights


def open_model(path: Path) -> Checkpoint:
    """A checkpoint, a run's latest or best one, or a model in Hugging Face's folder.

    Raises InputError where it is missing, damaged, or not a model that our config can describe.
    """
    if not is_model_folder(path):
        return checkpoint.load(path)
    config, weights = read_model(path)
    return Checkpoint(path, config, _state(path, config), weights)


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like Hugging Face's, and not like a checkpoint or a run."""
    if any((path / name).is_file() for name in (checkpoint.MANIFEST, checkpoint.STATE, "config.yaml")):
        return False
    return (path / checkpoint.CONFIG).is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))


def read_model(folder: Path) -> tuple[ModelConfig, Weights]:
    """The architecture and float32 weights of a model in Hugging Face's folder; InputError where they do not fit."""
    if not folder.is_dir():
        raise InputError(f"no model at {folder}: there is no such folder")
    family, config = read_config(folder)
    return config, unpack(find(folder, open_tensors(folder), family, config), config)


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


def import_model(folder: Path, out: Path) -> None:
    """Write a model of Hugging Face's as a checkpoint, with its tokenizer; InputError where `out` exists."""
    if (folder / checkpoint.MANIFEST).is_file():
        raise InputError(f"{folder} is a checkpoint already; use it as it is")
    config, weights = read_model(folder)
    state, console = _state(folder, config), Console()
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    if tokenizer is None:
        console.warn(f"{folder} has no tokenizer.json; the checkpoint is without a tokenizer")
    elif (size := Tokenizer.load(folder).vocab_size) > config.vocab_size:
        raise InputError(f"{folder}: tokenizer.json has {size} tokens, the model only {config.vocab_size}")
    checkpoint.create(out, config, state, lambda name: [weights[name]], tokenizer)
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
    for document in open_source(DataConfig(source=text, n_documents=None)).documents():
        ids += [*tokenizer.encode(document), tokenizer.eot_id]
        if len(ids) > n + n // width + width:
            break
    if max(ids) >= source.config.vocab_size:
        raise InputError(f"{source.path}: {text} has token {max(ids)}, the model only {source.config.vocab_size}")
    width = min(width, len(ids) - 1)
    return fixed_windows(np.array(ids), -(-n // width), width)[:, :-1]


def upcycle_model(
    path: Path,
    out: Path,
    backend: Backend,
    device: str,
    allow_lossy: bool,
    phase: UpcyclePhaseConfig,
    seed: int,
    text: str | None,
) -> bool:
    """`transfer_model` to the experts that a phase asks for; their routers' centroids are those of a text."""
    if (phase.router_init == "centroids") != (text is not None):
        raise InputError("--router centroids and --text FILE go together: clusters are of the model's states on a text")

    def plan(source: Checkpoint) -> Plan:
        routers = None
        if text is not None:
            tokens_BT = text_tokens(source, text, centroid_tokens(phase))
            model = backend.streamed(source.config, source.weights, device)
            routers = centroid_routers(model, phase, tokens_BT, seed)
        return plan_phase(source.config, phase, seed, routers)

    return transfer_model(path, out, backend, device, allow_lossy, plan)


def transfer_model(
    path: Path, out: Path, backend: Backend, device: str, allow_lossy: bool, plan: Callable[[Checkpoint], Plan]
) -> bool:
    """Apply a plan to a model, certify and write it; whether it was written. One that is lossy on purpose always is."""
    source = open_model(path)
    made = plan(source)
    allow_lossy = allow_lossy or made.is_lossy
    console = Console()
    console.line(f"backend: {backend.reason}")
    limits = VerificationConfig()
    probes_BT1 = probe_tokens(source, limits.probe_sequences)
    transfer = transfer_checkpoint(source, made, out, backend, device, limits, allow_lossy, probes_BT1)
    console.boundary(f"{source.config.display_name} -> {made.target_config.display_name}", transfer.certificate)
    if not transfer.certificate.passed and not allow_lossy:
        return False
    console.parameters(count_parameters(made.target_config), made.target_config.display_name)
    console.line(
        f"wrote {out}: {transfer.bytes_written / 1e9:.2f} GB in {transfer.seconds - transfer.seconds_certified:.1f} s, "
        f"certified in {transfer.seconds_certified:.1f} s"
    )
    if made.is_lossy:
        console.line(LOSSY_METHOD)
    return True
