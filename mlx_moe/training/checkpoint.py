"""Checkpoints: a folder that is there whole or not at all, and that says what it holds.

`config.json` (the model), `model.safetensors`, `optimizer.safetensors` (absent where the optimizer starts fresh),
`trainer.json` (phase, step) and `manifest.json` (bytes and SHA-256 of each). Either backend reads the other's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mlx_moe import config as configs
from mlx_moe.config import ModelConfig
from mlx_moe.data.tokenizers import copy_tokenizer
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, Weights, merged, shapes
from mlx_moe.tensor_files import Blocks, StoredTensor, read_header, sha256, stored_weights, write_file
from mlx_moe.training.files import flush, make_folder, remove, replacing, sweep
from mlx_moe.validation import read_mapping, validate

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, STATE, MANIFEST = "config.json", "trainer.json", "manifest.json"
PHASE_FOLDERS = {1: "1-dense", 2: "2-moe", 3: "3-large-moe"}

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TrainerState:
    """Where in a run a checkpoint stands: `step` optimizer steps into `phase` (1, 2 or 3)."""

    phase: Annotated[int, Field(ge=1, le=3)]
    step: Annotated[int, Field(ge=0)]
    backend: str
    validation_loss: float | None = None
    lineage: tuple[str, ...] = ()  # the model that it comes from, and what became of that before this phase


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    config: ModelConfig
    state: TrainerState
    weights: Weights

    @cached_property
    def optimizer_state(self) -> Arrays | None:
        """Adam's moments, read when asked for: only training needs them. None where the optimizer starts fresh."""
        return _read(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer beside the checkpoint, or that of its run; a Hugging Face folder is its own."""
        if (self.path / "tokenizer.json").is_file():
            return self.path
        folders = (parent / "tokenizer" for parent in [self.path, *self.path.resolve().parents[:4]])
        return next((folder for folder in folders if folder.is_dir()), None)


def folder(run: Path, phase: int, step: int) -> Path:
    return run / "phases" / PHASE_FOLDERS[phase] / "checkpoints" / f"step-{step}"


def save(
    path: Path,
    config: ModelConfig,
    state: TrainerState,
    weights: Weights,
    optimizer_state: Weights | None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint, so that no half of it is ever seen.

    `tokenizer`: a folder to copy in, for a checkpoint outside a run. Raises InputError where the disk does not let it.
    """
    save_blocks(path, config, state, lambda name: [weights[name]], tokenizer, optimizer_state=optimizer_state)


def save_blocks(
    path: Path,
    config: ModelConfig,
    state: TrainerState,
    blocks: Blocks,
    tokenizer: Path | None = None,
    check: Callable[[Weights], None] | None = None,
    optimizer_state: Weights | None = None,
) -> None:
    """`save`, where the weights come piece by piece; `check` may look at what was written, and raise."""
    try:
        make_folder(path.parent)
        with replacing(path) as partial:
            partial.mkdir()
            model = partial / MODEL
            hashes = {MODEL: write_file(model, shapes(config), blocks, hashed=check is None)}
            if check is not None:
                with ThreadPoolExecutor(2) as threads:  # neither disk nor hash need wait for the check, nor it for them
                    flushed, digest = threads.submit(flush, model), threads.submit(sha256, model)
                    check(stored_weights(read_header(model)))
                flushed.result()
                hashes[MODEL] = digest.result()
            if optimizer_state is not None:
                sizes = {name: array.shape for name, array in optimizer_state.items()}
                hashes[OPTIMIZER] = write_file(partial / OPTIMIZER, sizes, lambda name: [optimizer_state[name]])
            if tokenizer is not None:
                copy_tokenizer(tokenizer, partial / "tokenizer")
            configs.save(config, partial / CONFIG)
            (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
            manifest = {
                file.name: {"bytes": file.stat().st_size, "sha256": hashes.get(file.name) or sha256(file)}
                for file in sorted(partial.iterdir())
                if file.is_file()
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write checkpoint {path}: {error.strerror or error}; nothing of it was kept") from None


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint, adapters merged; a run's folder stands for its latest one, `RUN/best` for its best.

    Raises InputError when it is missing, incomplete, altered, or does not hold the tensors that its config asks for.
    """
    path = resolve(path)
    verify(path)
    saved = _load_verified(path)
    config, weights = merged(saved.config, saved.weights)
    return Checkpoint(path, config, saved.state, weights)


def load_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint of a run that is whole; None where none was saved yet.

    Clears away what a kill left. Damaged ones that come later are renamed to `step-N.damaged`, with a warning. Raises
    InputError where all are damaged: none is renamed then.
    """
    for checkpoints in run.glob("phases/*/checkpoints"):
        sweep(checkpoints)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_folders(run)):
        if (damage := _damage(path)) is not None:
            damaged.append((path, damage))
            continue
        for later, damage in damaged:
            aside = _set_aside(later)
            warn(f"checkpoint {later} {damage}; it is now {aside.name}, and {path.relative_to(run)} takes its place")
        return _load_verified(path)
    if damaged:
        path, damage = damaged[0]
        raise InputError(f"no checkpoint in {run} is whole; {path} {damage}; put back a copy, or begin another run")
    return None


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, the latest of the run or phase that it is, the best for `RUN/best`."""
    if (path / MANIFEST).is_file():
        return path
    if path.name == "best" and path.parent.is_dir():
        if (found := best(path.parent)) is None:
            raise InputError(f"no checkpoint at {path}: none in {path.parent} has a validation loss")
        return found
    if not path.exists():
        raise InputError(f"no checkpoint at {path}: there is no such folder")
    if (found := latest(path)) is None:
        raise InputError(f"no checkpoint at {path}: neither a checkpoint ({MANIFEST} is missing) nor a run with one")
    return found


def latest(path: Path) -> Path | None:
    """The last complete checkpoint of a run or a phase."""
    return next(reversed(list(complete_in(path))), None)


def best(path: Path) -> Path | None:
    """The checkpoint of a run or a phase with the lowest validation loss, the first of equals."""
    return min(
        (folder for folder in complete_in(path) if math.isfinite(_validation_loss(folder))),
        key=_validation_loss,
        default=None,
    )


def best_validation_loss(path: Path) -> float:
    """That of `best`, nats per token; infinite where no checkpoint has one."""
    return math.inf if (found := best(path)) is None else _validation_loss(found)


def complete_in(path: Path) -> Iterator[Path]:
    """The complete checkpoints of a run, of a phase, or of its `checkpoints/`, the earliest first."""
    yield from (folder for folder in _folders(path) if (folder / MANIFEST).is_file())


def _folders(path: Path) -> list[Path]:
    """The folders that should be checkpoints, in the order of `complete_in`."""
    found = [
        folder
        for level in ("phases/*/checkpoints", "checkpoints", ".")
        for folder in path.glob(f"{level}/step-*")
        if folder.name.removeprefix("step-").isdecimal()
    ]
    return sorted(found, key=lambda folder: (folder.parts[:-1], int(folder.name.removeprefix("step-"))))


def keep_last(path: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of a phase; its birth (step 0) and its best stay."""
    later = [checkpoint for checkpoint in complete_in(path) if checkpoint.name != "step-0"]
    lowest = best(path)
    for checkpoint in later[:-keep]:
        if checkpoint != lowest:
            remove(checkpoint)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        remove(aside)
    return path.rename(aside)


def _validation_loss(path: Path) -> float:
    """Infinite where it was not measured, or cannot be read: what is damaged is nobody's best."""
    try:
        loss = json.loads((path / STATE).read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return loss if isinstance(loss, float) else math.inf


def verify(path: Path) -> None:
    """Raise InputError unless every file is there with the size and hash that the manifest states."""
    if (damage := _damage(path)) is not None:
        raise InputError(f"checkpoint {path} {damage}; take an earlier one")


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in sorted({CONFIG, MODEL, STATE} | manifest.keys()):
            file = path / name
            if not file.is_file():
                return f"is incomplete: {name} is missing"
            if (stated := manifest.get(name)) is None:
                return f"is damaged: {MANIFEST} does not list {name}"
            if (size := file.stat().st_size) != stated["bytes"]:
                return f"is damaged: {name} has {size} bytes where {stated['bytes']} were written"
            if sha256(file) != stated["sha256"]:
                return f"is damaged: {name} was altered (SHA-256)"
    except FileNotFoundError:
        return f"is incomplete: {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"cannot be read: {MANIFEST}: {error}"
    return None


def _load_verified(path: Path) -> Checkpoint:
    config, state = _parse(ModelConfig, path / CONFIG), _parse(TrainerState, path / STATE)
    tensors = read_header(path / MODEL)
    _check_shapes(path, config, tensors)
    return Checkpoint(path, config, state, stored_weights(tensors))


def _parse(kind: type[Parsed], file: Path) -> Parsed:
    values = read_mapping(file)
    try:
        return validate(kind, values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {'; '.join(str(error).splitlines())}") from None


def _read(file: Path) -> Arrays:
    try:
        return load_file(file)
    except (OSError, SafetensorError, TypeError) as error:  # a TypeError where NumPy does not know the dtype
        raise InputError(f"cannot read {file}: {error}") from None


def _check_shapes(path: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    expected = shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"checkpoint {path}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise InputError(f"checkpoint {path}: {name} has shape {tensors[name].shape}, its config asks for {shape}")
        if tensors[name].dtype != "F32":
            raise InputError(f"checkpoint {path}: {name} holds {tensors[name].dtype}; write it as float32")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"checkpoint {path}: its config has no tensor {extra[0]} ({len(extra)} such)")
