"""Checkpoints: folders written atomically, with a manifest of their files.

`config.json` (the model), `model.safetensors`, `optimizer.safetensors` (absent if the optimizer starts fresh),
`trainer.json` (phase, step) and `manifest.json` (bytes and SHA-256 of each). Both backends read and write the same
format.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field

from mlx_moe import config as configs
from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError, one_line
from mlx_moe.limits import MAX_PHASES
from mlx_moe.parameters import Arrays, Weights, merge_lora, shapes
from mlx_moe.storage import locks
from mlx_moe.storage.atomic import (
    clean_leftovers,
    culprit,
    flush,
    make_folder,
    new_folder,
    quarantine,
    remove_folder,
)
from mlx_moe.storage.reading import read_mapping
from mlx_moe.storage.regular_files import open_regular
from mlx_moe.storage.tensor_files import Blocks, StoredTensor, read_header, sha256, stored_weights, write_file
from mlx_moe.storage.tokenizer_files import copy_tokenizer
from mlx_moe.validation import validate

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
CONFIG, STATE, MANIFEST = "config.json", "trainer.json", "manifest.json"
TOKENIZER, RUN_CONFIG = "tokenizer", "config.yaml"
STEP = re.compile(r"step-(0|[1-9][0-9]{0,11})")
PHASE_FOLDER = re.compile(r"([1-9][0-9]?)-[A-Za-z][A-Za-z0-9-]{0,39}")

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TrainerState:
    """Position of a checkpoint in its run: `step` optimizer steps into `phase`, counted from 1."""

    phase: Annotated[int, Field(ge=1, le=MAX_PHASES)]
    step: Annotated[int, Field(ge=0)]
    backend: str
    validation_loss: float | None = None
    lineage: tuple[str, ...] = ()  # the model it started from, and the transfers before this phase
    has_optimizer_state: bool | None = None  # None: written by a version that did not record it
    phase_name: str | None = None  # None: not part of a run
    transfer: str | None = None  # the config's name of the transfer that the phase began with

    @property
    def phase_folder(self) -> str:
        """Name of the folder of the checkpoint's phase, such as `2-moe`."""
        return phase_folder(self.phase, self.phase_name or "model")


class Pruned(InputError):
    """The run deleted a checkpoint between finding it and opening it."""


class Hold:
    """Shared lock that keeps a training run from pruning a checkpoint, for the lifetime of the object."""

    def __init__(self, path: Path):
        """Lock the folder. Raises Pruned if it no longer exists."""
        self._descriptor: int | None = None
        try:
            self._descriptor = locks.wait_for(path, shared=True)  # the run may be about to delete it
        except FileNotFoundError:
            raise Pruned(f"checkpoint {path} is gone: its run deleted it; take a later one") from None
        except (OSError, locks.Busy):  # no permission, or a long wait: read without a lock
            pass

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    config: ModelConfig
    state: TrainerState
    weights: Weights
    hold: Hold | None = field(default=None, repr=False, compare=False)

    @cached_property
    def optimizer_state(self) -> Arrays | None:
        """Return Adam's moments, read lazily (only training needs them); None if the optimizer starts fresh."""
        return _read(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the tokenizer's folder: the checkpoint itself (Hugging Face), its `tokenizer/`, or its run's."""
        if (self.path / "tokenizer.json").is_file():
            return self.path
        runs = (folder for folder in self.path.resolve().parents[:4] if (folder / RUN_CONFIG).is_file())
        return next((folder / TOKENIZER for folder in (self.path, *runs) if (folder / TOKENIZER).is_dir()), None)


def phase_folder(number: int, name: str) -> str:
    """Return the name of a phase's folder, such as `3-large-moe` for phase 3, `large_moe`."""
    return f"{number}-{name.replace('_', '-')}"


def folder(run: Path, phase: str, step: int) -> Path:
    """Return a checkpoint's folder in a run; `phase` is the name of the phase's folder."""
    return run / "phases" / phase / "checkpoints" / f"step-{step}"


def phase_folders(run: Path) -> list[Path]:
    """Return the folders of a run's phases, in order; copies, whose checkpoints name another folder, are left out."""
    numbered = [
        (int(found[1]), folder)
        for folder in (run / "phases").glob("*")
        if (found := PHASE_FOLDER.fullmatch(folder.name)) and folder.is_dir() and not _is_copy(folder)
    ]
    return [folder for _, folder in sorted(numbered)]


def _is_copy(phase: Path) -> bool:
    """Return whether all checkpoints in a phase's folder name another phase."""
    states = [state for file in phase.glob(f"checkpoints/step-*/{STATE}") if (state := _read_state(file)) is not None]
    return bool(states) and not any(_belongs_to(state, phase.name) for state in states)


def _belongs_to(state: TrainerState, phase: str) -> bool:
    if state.phase_name is not None:
        return state.phase_folder == phase
    return phase.partition("-")[0] == str(state.phase)


def _read_state(file: Path) -> TrainerState | None:
    try:
        return _parse(TrainerState, file)
    except InputError:
        return None


def save(
    path: Path, config: ModelConfig, state: TrainerState, weights: Weights, optimizer_state: Weights | None
) -> None:
    """Write a run's checkpoint atomically; rename whatever is at `path` already.

    Raises InputError if the disk refuses.
    """
    try:
        make_folder(path.parent)
        with new_folder(path, aside="earlier") as partial:
            fill(partial, config, state, lambda name: [weights[name]], optimizer_state=optimizer_state)
    except OSError as error:
        raise InputError(f"cannot write checkpoint {path}: {error.strerror or error}; nothing of it was kept") from None


def fill(
    folder: Path,
    config: ModelConfig,
    state: TrainerState,
    blocks: Blocks,
    tokenizer: Path | None = None,
    check: Callable[[Weights], None] | None = None,
    optimizer_state: Weights | None = None,
) -> None:
    """Write a checkpoint's files and manifest into a folder that is not visible yet.

    `tokenizer`: a folder to copy in; `check` may inspect the written weights and raise.
    """
    model = folder / MODEL
    hashes = {MODEL: write_file(model, shapes(config), blocks, hashed=check is None)}
    if check is not None:
        with ThreadPoolExecutor(2) as threads:  # flush and hash while `check` runs
            flushed, digest = threads.submit(flush, model), threads.submit(sha256, model)
            check(stored_weights(read_header(model)))
        flushed.result()
        hashes[MODEL] = digest.result()
    if optimizer_state is not None:
        sizes = {name: array.shape for name, array in optimizer_state.items()}
        hashes[OPTIMIZER] = write_file(folder / OPTIMIZER, sizes, lambda name: [optimizer_state[name]])
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / TOKENIZER)
    configs.save(config, folder / CONFIG)
    state = replace(state, has_optimizer_state=optimizer_state is not None)
    (folder / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    manifest = {
        name: {"bytes": file.stat().st_size, "sha256": hashes.get(name) or sha256(file)} for name, file in files.items()
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> Checkpoint:
    """Load and verify a checkpoint, with adapters merged; a run's folder means its latest, `RUN/best` its best.

    A training run does not delete the checkpoint while the result lives. Raises InputError if it is missing,
    incomplete, altered, or lacks tensors that its config requires; Pruned if a run deleted it meanwhile.
    """
    found, hold = _resolve_and_hold(path)
    verify(found)
    saved = _load_verified(found, hold)
    config, weights = merge_lora(saved.config, saved.weights)
    return replace(saved, config=config, weights=weights)


def load_listed(path: Path) -> Checkpoint:
    """Load a checkpoint that was just found in its run (see `load`). Raises Pruned if the run has deleted it since."""
    hold = Hold(path)  # until `load` takes its own lock
    loaded = load(path)
    del hold
    return loaded


def _resolve_and_hold(path: Path) -> tuple[Path, Hold]:
    """Resolve a path to a checkpoint and lock it; if a run deletes it meanwhile, resolve again."""
    while True:
        found = resolve(path)
        try:
            return found, Hold(found)
        except Pruned:
            if found == path or resolve(path) == found:
                raise


def load_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return a run's last undamaged checkpoint; None if none was saved yet.

    Deletes leftovers of a kill. Renames later, damaged checkpoints to `step-N.damaged`, with a warning. Raises
    InputError, and renames none, if all are damaged.
    """
    for phase in phase_folders(run):
        clean_leftovers(phase / "checkpoints")
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_folders(run)):
        if (damage := _damage(path)) is not None:
            damaged.append((path, damage))
            continue
        for later, damage in damaged:
            aside = quarantine(later, "damaged")
            warn(f"checkpoint {later} {damage}; it is now {aside.name}, and {path.relative_to(run)} takes its place")
        return _load_verified(path, Hold(path))
    if damaged:
        path, damage = damaged[0]
        raise InputError(f"no checkpoint in {run} is whole; {path} {damage}; restore a copy, or begin another run")
    return None


def resolve(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, the latest of a run or phase, the best for `RUN/best`."""
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
    """Return the last complete checkpoint of a run or a phase."""
    return next(reversed(list(complete_in(path))), None)


def best(path: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss in a run or a phase; ties go to the first."""
    return min(
        (folder for folder in complete_in(path) if math.isfinite(_validation_loss(folder))),
        key=_validation_loss,
        default=None,
    )


def best_validation_loss(path: Path) -> float:
    """Return the lowest validation loss (nats per token) among the checkpoints; inf if there is none."""
    return math.inf if (found := best(path)) is None else _validation_loss(found)


def complete_in(path: Path) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, a phase, or its `checkpoints/`, earliest first.

    A folder whose trainer.json names another phase or step than its path is a copy, and is left out.
    """
    yield from (folder for folder in _folders(path) if (folder / MANIFEST).is_file() and not _misplaced(folder))


def _folders(path: Path) -> list[Path]:
    """Return the folders that may be checkpoints, in the order of `complete_in`."""
    levels = [*(phase / "checkpoints" for phase in phase_folders(path)), path / "checkpoints", path]
    return [
        folder
        for level in levels
        for folder in sorted(level.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))
        if STEP.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    ]


def keep_last(path: Path, keep: int) -> None:
    """Delete all but a phase's last `keep` checkpoints, its step-0 checkpoint and its best.

    Checkpoints that another process reads, or that contain foreign files, are kept too.
    """
    later = [checkpoint for checkpoint in complete_in(path) if checkpoint.name != "step-0"]
    lowest = best(path)
    for checkpoint in later[:-keep]:
        if checkpoint != lowest:
            try:
                listed = {MANIFEST, *_manifest(checkpoint)}
            except (OSError, InputError):  # which of its files are ours is unknown
                continue
            folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
            remove_folder(checkpoint, lambda entry, ours=listed | folders: entry.as_posix() in ours)  # type: ignore[misc]


def _validation_loss(path: Path) -> float:
    """Return the validation loss in nats per token; inf if it was not measured or cannot be read."""
    state = _read_state(path / STATE)
    return math.inf if state is None or state.validation_loss is None else state.validation_loss


def _misplaced(path: Path) -> str | None:
    """Describe how the phase or step in trainer.json contradicts the folder's path; None if it does not.

    An unreadable file contradicts nothing.
    """
    state = _read_state(path / STATE)
    above, phase, below, name = ("", "", "", "", *path.absolute().parts)[-4:]
    if state is None or above != "phases" or below != "checkpoints":
        return None
    if name == f"step-{state.step}" and _belongs_to(state, phase):
        return None
    return f"is not what its place says: {STATE} names phase {state.phase}, step {state.step}"


def verify(path: Path) -> None:
    """Raise InputError unless every file is there with the size and hash of the manifest."""
    if (damage := _damage(path)) is not None:
        raise InputError(f"checkpoint {path} {damage}; take an earlier one, or restore a copy")


def _damage(path: Path) -> str | None:
    """Describe how a checkpoint differs from its manifest; None if it does not.

    Raises InputError if the system denies reading: the checkpoint may be intact.
    """
    try:
        manifest = _manifest(path)
        present = {name for name in (CONFIG, MODEL, OPTIMIZER, STATE) if os.path.lexists(path / name)}
        for name in sorted({CONFIG, MODEL, STATE} | present | manifest.keys()):
            file = path / name
            if not file.is_file() or file.is_symlink():
                return f"is incomplete: {name} is missing"
            if (stated := manifest.get(name)) is None:
                return f"is damaged: {MANIFEST} does not list {name}"
            if (size := file.stat().st_size) != stated.bytes:
                return f"is damaged: {name} has {size} bytes where {stated.bytes} were written"
            if sha256(file) != stated.sha256:
                return f"is damaged: {name} was altered (SHA-256)"
    except FileNotFoundError:
        return f"is incomplete: {MANIFEST} is missing"
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"cannot read {culprit(error, path)}: {reason}; make it readable, or move it away") from None
    except InputError as error:
        return f"cannot be read: {MANIFEST}: {one_line(error)}"
    return _misplaced(path)


@dataclass(frozen=True)
class ListedFile:
    """A file in a manifest."""

    bytes: int
    sha256: str


def _manifest(path: Path) -> dict[str, ListedFile]:
    """Return the files listed in a checkpoint's manifest, by relative path. Raises OSError, InputError."""
    os.close(open_regular(path / MANIFEST))  # a manifest that cannot be opened is not necessarily damaged
    manifest = validate(dict[str, ListedFile], read_mapping(path / MANIFEST))
    for name in manifest:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name:
            raise InputError(f"{name!r} is not in the checkpoint's folder")
    return manifest


def _load_verified(path: Path, hold: Hold) -> Checkpoint:
    config, state = _parse(ModelConfig, path / CONFIG), _parse(TrainerState, path / STATE)
    if state.has_optimizer_state and not (path / OPTIMIZER).is_file():
        raise InputError(f"checkpoint {path} is incomplete: {OPTIMIZER} is missing; take an earlier one")
    tensors = read_header(path / MODEL)
    _check_shapes(path, config, tensors)
    return Checkpoint(path, config, state, stored_weights(tensors), hold)


def _parse(kind: type[Parsed], file: Path) -> Parsed:
    values = read_mapping(file)
    try:
        return validate(kind, values)
    except InputError as error:
        raise InputError(f"cannot read {file}: {'; '.join(error.lines)}") from None


def _read(file: Path) -> Arrays:
    tensors = read_header(file)
    for name, tensor in tensors.items():
        if tensor.dtype != "F32":
            raise InputError(f"cannot read {file}: {name} holds {tensor.dtype}; the optimizer's state is float32")
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


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
