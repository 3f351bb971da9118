"""Checkpoints: a folder that is there whole or not at all, and that says what it holds.

`config.json` (the model), `model.safetensors`, `optimizer.safetensors` (absent where the optimizer starts fresh),
`trainer.json` (phase, step) and `manifest.json` (bytes and SHA-256 of each). Written by either backend, read by the
other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mlx_moe import config as configs
from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, table
from mlx_moe.validation import read_mapping, validate

MODEL, OPTIMIZER, CONFIG, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "config.json",
    "trainer.json",
    "manifest.json",
)
PHASE_FOLDERS = {1: "1-dense", 2: "2-moe", 3: "3-large-moe"}

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TrainerState:
    """Where in a run a checkpoint stands: `step` optimizer steps into `phase` (1, 2 or 3)."""

    phase: Annotated[int, Field(ge=1, le=3)]
    step: Annotated[int, Field(ge=0)]
    backend: str
    validation_loss: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    config: ModelConfig
    state: TrainerState
    weights: Arrays

    @cached_property
    def optimizer_state(self) -> Arrays | None:
        """Adam's moments, read when asked for: only training needs them. None where the optimizer starts fresh."""
        return _read(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer beside the checkpoint, or that of the run it belongs to."""
        folders = (parent / "tokenizer" for parent in [self.path, *self.path.resolve().parents[:4]])
        return next((folder for folder in folders if folder.is_dir()), None)


def folder(run: Path, phase: int, step: int) -> Path:
    return run / "phases" / PHASE_FOLDERS[phase] / "checkpoints" / f"step-{step}"


def save(
    path: Path,
    config: ModelConfig,
    state: TrainerState,
    weights: Arrays,
    optimizer_state: Arrays | None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint under a temporary name, flush it to disk and rename it, so that no half of it is ever seen.

    `tokenizer`: a folder to copy in, for a checkpoint outside a run. Raises InputError where the disk does not let it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(weights, partial / MODEL)
        if optimizer_state is not None:
            _write(optimizer_state, partial / OPTIMIZER)
        if tokenizer is not None:
            shutil.copytree(tokenizer, partial / "tokenizer")
        configs.save(config, partial / CONFIG)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(partial.iterdir())
            if file.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for entry in [*partial.rglob("*"), partial]:
            _flush(entry)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write checkpoint {path}: {reason}; nothing of it was kept") from None


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; a run's folder stands for its latest one.

    Raises InputError when it is missing, incomplete, altered, or does not hold the tensors that its config asks for.
    """
    path = resolve(path)
    verify(path)
    config, state = _parse(ModelConfig, path / CONFIG), _parse(TrainerState, path / STATE)
    weights = _read(path / MODEL)
    _check_shapes(path, config, weights)
    return Checkpoint(path, config, state, weights)


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the latest of the run (or phase) that it is."""
    if (path / MANIFEST).is_file():
        return path
    if not path.exists():
        raise InputError(f"no checkpoint at {path}: there is no such folder")
    if (found := latest(path)) is None:
        raise InputError(f"no checkpoint at {path}: neither a checkpoint ({MANIFEST} is missing) nor a run with one")
    return found


def latest(path: Path) -> Path | None:
    """The last complete checkpoint of a run or a phase."""
    return next(reversed(list(complete_in(path))), None)


def complete_in(path: Path) -> Iterator[Path]:
    """The complete checkpoints of a run, of a phase, or of its `checkpoints/`, the earliest first."""
    found = [
        manifest.parent
        for level in ("phases/*/checkpoints", "checkpoints", ".")
        for manifest in path.glob(f"{level}/step-*/{MANIFEST}")
        if manifest.parent.name.removeprefix("step-").isdecimal()
    ]
    yield from sorted(found, key=lambda folder: (folder.parts[:-1], int(folder.name.removeprefix("step-"))))


def keep_last(path: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of a phase; its birth (step 0) stays."""
    later = [checkpoint for checkpoint in complete_in(path) if checkpoint.name != "step-0"]
    for checkpoint in later[:-keep]:
        shutil.rmtree(checkpoint)


def verify(path: Path) -> None:
    """Raise InputError unless every file is there with the size and hash that the manifest states."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in sorted({CONFIG, MODEL, STATE} | manifest.keys()):
            file = path / name
            if not file.is_file():
                raise InputError(f"checkpoint {path} is incomplete: {name} is missing; take an earlier one")
            if (stated := manifest.get(name)) is None:
                raise InputError(f"checkpoint {path} is damaged: {MANIFEST} does not list {name}; take an earlier one")
            if (size := file.stat().st_size) != stated["bytes"]:
                raise InputError(
                    f"checkpoint {path} is damaged: {name} has {size} bytes where {stated['bytes']} were written; "
                    "take an earlier one"
                )
            if _sha256(file) != stated["sha256"]:
                raise InputError(f"checkpoint {path} is damaged: {name} was altered (SHA-256); take an earlier one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"checkpoint {path} cannot be read: {MANIFEST}: {error}; take an earlier one") from None


def _parse(kind: type[Parsed], file: Path) -> Parsed:
    values = read_mapping(file)
    try:
        return validate(kind, values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {'; '.join(str(error).splitlines())}") from None


def _write(arrays: Arrays, file: Path) -> None:
    # safetensors writes memory as it lies; what MLX hands out may be a transposed view.
    in_order = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(in_order, file, metadata={"format": "np"})
    file.chmod(mode)  # safetensors would let nobody else read it


def _read(file: Path) -> Arrays:
    try:
        return load_file(file)
    except (OSError, SafetensorError, TypeError) as error:  # a TypeError where NumPy does not know the dtype
        raise InputError(f"cannot read {file}: {error}") from None


def _check_shapes(path: Path, config: ModelConfig, weights: Arrays) -> None:
    expected = {parameter.name: parameter.shape for parameter in table(config)}
    for name, shape in expected.items():
        if name not in weights:
            raise InputError(f"checkpoint {path}: tensor {name} is missing")
        if weights[name].shape != shape:
            raise InputError(f"checkpoint {path}: {name} has shape {weights[name].shape}, its config asks for {shape}")
        if weights[name].dtype != "float32":
            raise InputError(f"checkpoint {path}: {name} holds {weights[name].dtype}; write it as float32")
    if extra := sorted(weights.keys() - expected.keys()):
        raise InputError(f"checkpoint {path}: its config has no tensor {extra[0]} ({len(extra)} such)")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
