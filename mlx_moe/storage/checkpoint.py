"""Checkpoints: a folder that is there whole or not at all, and that says what it holds.

`config.json` (the model), `model.safetensors`, `optimizer.safetensors` (absent where the optimizer starts fresh),
`trainer.json` (phase, step) and `manifest.json` (bytes and SHA-256 of each). Either backend reads the other's.
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
from mlx_moe.parameters import Arrays, Weights, merged, shapes
from mlx_moe.storage import locks
from mlx_moe.storage.atomic import (
    clean_leftovers,
    creating,
    culprit,
    flush,
    make_folder,
    new_folder,
    remove_folder,
    set_aside,
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
    """Place of a checkpoint in a run: `step` optimizer steps into `phase`, which is counted from 1."""

    phase: Annotated[int, Field(ge=1, le=MAX_PHASES)]
    step: Annotated[int, Field(ge=0)]
    backend: str
    validation_loss: float | None = None
    lineage: tuple[str, ...] = ()  # the model that it comes from, and what became of that before this phase
    has_optimizer_state: bool | None = None  # None: written before this was kept
    phase_name: str | None = None  # None: not of a run
    transfer: str | None = None  # the one that the phase began with, by its name in the config

    @property
    def phase_folder(self) -> str:
        """Name of the folder of the checkpoint's phase, such as `2-moe`."""
        return phase_folder(self.phase, self.phase_name or "model")


class Pruned(InputError):
    """A checkpoint was deleted by the run that it belongs to, between finding it and opening it."""


class Hold:
    """Keeps a checkpoint's folder from being pruned by a run that trains, for as long as the object lives."""

    def __init__(self, path: Path):
        """Raises Pruned where the folder is no longer there."""
        self._descriptor: int | None = None
        try:
            self._descriptor = locks.wait_for(path, shared=True)  # the run may be about to delete it
        except FileNotFoundError:
            raise Pruned(f"checkpoint {path} is gone: its run deleted it; take a later one") from None
        except (OSError, locks.Busy):  # it may not be opened, or whoever has it takes long: reading goes ahead
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
        """Adam's moments, read when asked for: only training needs them. None where the optimizer starts fresh."""
        return _read(self.path / OPTIMIZER) if (self.path / OPTIMIZER).exists() else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer beside the checkpoint, or that of its run; a Hugging Face folder is its own."""
        if (self.path / "tokenizer.json").is_file():
            return self.path
        runs = (folder for folder in self.path.resolve().parents[:4] if (folder / RUN_CONFIG).is_file())
        return next((folder / TOKENIZER for folder in (self.path, *runs) if (folder / TOKENIZER).is_dir()), None)


def phase_folder(number: int, name: str) -> str:
    """Return the name of a phase's folder, such as `3-large-moe` for phase 3, `large_moe`."""
    return f"{number}-{name.replace('_', '-')}"


def folder(run: Path, phase: str, step: int) -> Path:
    """Return the place of a checkpoint of a run; `phase` is the name of the phase's folder."""
    return run / "phases" / phase / "checkpoints" / f"step-{step}"


def phase_folders(run: Path) -> list[Path]:
    """Return the folders of a run's phases, in order, without copies of them: their checkpoints name another folder."""
    numbered = [
        (int(found[1]), folder)
        for folder in (run / "phases").glob("*")
        if (found := PHASE_FOLDER.fullmatch(folder.name)) and folder.is_dir() and not _is_copy(folder)
    ]
    return [folder for _, folder in sorted(numbered)]


def _is_copy(phase: Path) -> bool:
    """Return whether all checkpoints in a phase's folder say that they belong to another one."""
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
    """Write a checkpoint of a run, so that no half of it is ever seen. What is at `path` already is set aside.

    Raises InputError where the disk does not let it.
    """
    try:
        make_folder(path.parent)
        with new_folder(path, aside="earlier") as partial:
            fill(partial, config, state, lambda name: [weights[name]], optimizer_state=optimizer_state)
    except OSError as error:
        raise InputError(f"cannot write checkpoint {path}: {error.strerror or error}; nothing of it was kept") from None


def create(
    path: Path,
    config: ModelConfig,
    state: TrainerState,
    blocks: Blocks,
    tokenizer: Path | None = None,
    check: Callable[[Weights], None] | None = None,
) -> None:
    """Write a checkpoint outside a run, where nothing may be yet, its weights piece by piece, without moments.

    `tokenizer`: a folder to copy in; `check` may look at what was written, and raise. Raises InputError as `creating`.
    """
    with creating(path) as partial:
        fill(partial, config, state, blocks, tokenizer, check)


def fill(
    folder: Path,
    config: ModelConfig,
    state: TrainerState,
    blocks: Blocks,
    tokenizer: Path | None = None,
    check: Callable[[Weights], None] | None = None,
    optimizer_state: Weights | None = None,
) -> None:
    """Write the files of a checkpoint into a folder that is not seen yet; the manifest lists all of them."""
    model = folder / MODEL
    hashes = {MODEL: write_file(model, shapes(config), blocks, hashed=check is None)}
    if check is not None:
        with ThreadPoolExecutor(2) as threads:  # neither disk nor hash need wait for the check, nor it for them
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
    """Read and verify a checkpoint, adapters merged; a run's folder stands for its latest one, `RUN/best` for its best.

    While the result lives, a run that trains does not delete the checkpoint. Raises InputError when it is missing,
    incomplete, altered, or does not hold the tensors that its config asks for; Pruned where a run deleted it meanwhile.
    """
    found, hold = _resolve_and_hold(path)
    verify(found)
    saved = _load_verified(found, hold)
    config, weights = merged(saved.config, saved.weights)
    return replace(saved, config=config, weights=weights)


def load_listed(path: Path) -> Checkpoint:
    """Load (`load`) a checkpoint that was just found in its run. Raises Pruned where the run has deleted it since."""
    hold = Hold(path)  # until it has one of its own
    loaded = load(path)
    del hold
    return loaded


def _resolve_and_hold(path: Path) -> tuple[Path, Hold]:
    """The checkpoint that a path means, held; where a run deletes it in between, the one that has taken its place."""
    while True:
        found = resolve(path)
        try:
            return found, Hold(found)
        except Pruned:
            if found == path or resolve(path) == found:
                raise


def load_latest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint of a run that is whole; None where none was saved yet.

    Clears away what a kill left. Damaged ones that come later are renamed to `step-N.damaged`, with a warning. Raises
    InputError where all are damaged: none is renamed then.
    """
    for phase in phase_folders(run):
        clean_leftovers(phase / "checkpoints")
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_folders(run)):
        if (damage := _damage(path)) is not None:
            damaged.append((path, damage))
            continue
        for later, damage in damaged:
            aside = set_aside(later, "damaged")
            warn(f"checkpoint {later} {damage}; it is now {aside.name}, and {path.relative_to(run)} takes its place")
        return _load_verified(path, Hold(path))
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
    """The complete checkpoints of a run, of a phase, or of its `checkpoints/`, the earliest first.

    A folder whose trainer.json names another phase or step than its path is none of them: somebody copied it there.
    """
    yield from (folder for folder in _folders(path) if (folder / MANIFEST).is_file() and not _misplaced(folder))


def _folders(path: Path) -> list[Path]:
    """Return the folders that should be checkpoints, in the order of `complete_in`."""
    levels = [*(phase / "checkpoints" for phase in phase_folders(path)), path / "checkpoints", path]
    return [
        folder
        for level in levels
        for folder in sorted(level.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))
        if STEP.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    ]


def keep_last(path: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of a phase; its birth (step 0) and its best stay.

    One that another process reads, or into which somebody has put something, stays too.
    """
    later = [checkpoint for checkpoint in complete_in(path) if checkpoint.name != "step-0"]
    lowest = best(path)
    for checkpoint in later[:-keep]:
        if checkpoint != lowest:
            try:
                listed = {MANIFEST, *_manifest(checkpoint)}
            except (OSError, InputError):  # what in it is ours is not to be known
                continue
            folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
            remove_folder(checkpoint, lambda entry, ours=listed | folders: entry.as_posix() in ours)  # type: ignore[misc]


def _validation_loss(path: Path) -> float:
    """Validation loss in nats per token; infinite where it was not measured or cannot be read."""
    state = _read_state(path / STATE)
    return math.inf if state is None or state.validation_loss is None else state.validation_loss


def _misplaced(path: Path) -> str | None:
    """How the phase or step in trainer.json contradicts the folder's place, if it does; a file that cannot be read
    contradicts nothing.
    """
    state = _read_state(path / STATE)
    above, phase, below, name = ("", "", "", "", *path.absolute().parts)[-4:]
    if state is None or above != "phases" or below != "checkpoints":
        return None
    if name == f"step-{state.step}" and _belongs_to(state, phase):
        return None
    return f"is not what its place says: {STATE} names phase {state.phase}, step {state.step}"


def verify(path: Path) -> None:
    """Raise InputError unless every file is there with the size and hash that the manifest states."""
    if (damage := _damage(path)) is not None:
        raise InputError(f"checkpoint {path} {damage}; take an earlier one, or put back a copy")


def _damage(path: Path) -> str | None:
    """Describe how a checkpoint differs from what was written; None where it does not.

    Raises InputError where the system does not let it be read: it may be whole.
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
    """The files that a checkpoint lists, by their paths in it. Raises OSError, InputError."""
    os.close(open_regular(path / MANIFEST))  # a file that cannot be opened is another matter than a damaged one
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
