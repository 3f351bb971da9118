"""The folder of a run: everything that training writes, and reads back to resume.

Of several processes only rank 0 touches it, and broadcasts what it reads.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol

import numpy as np

from mlx_moe import config as configs
from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.processes import ProcessGroup, SingleProcess
from mlx_moe.storage import checkpoint, jsonl, locks
from mlx_moe.storage.atomic import (
    SYSTEM_FILES,
    clean_leftovers,
    culprit,
    flush,
    make_folder,
    new_folder,
    replacing,
)
from mlx_moe.storage.checkpoint import TrainerState
from mlx_moe.storage.identity import IDENTITY, RunIdentity, is_identity, read_identity
from mlx_moe.storage.reading import read_mapping
from mlx_moe.storage.records import HistoryRow, MetricsRow, Provenance, read_record
from mlx_moe.storage.tokenizer_files import copy_tokenizer
from mlx_moe.validation import validate

CONFIG, DATA, ENVIRONMENT = "config.yaml", "data.json", "environment.json"
METRICS, HISTORY, SAMPLES = "metrics.jsonl", "history.jsonl", "samples.md"

TOKENIZER = "tokenizer"

P = ParamSpec("P")


def resume_command(run: Path, *options: str) -> str:
    """Return the command that resumes a run, quoted for the shell."""
    return shlex.join(["mlxmoe", "train", "--resume", str(run), *options])


def check_new(path: Path) -> None:
    """Raise InputError unless a run can begin at `path`: a new path, or a folder without visible files."""
    if path.is_dir():
        passing = (entry for entry in path.iterdir() if entry.name[0] != "." and entry.name not in SYSTEM_FILES)
        if not all(map(is_identity, passing)):
            advice = f", or resume it: {resume_command(path)}" if (path / CONFIG).is_file() else ""
            raise InputError(f"{path} is not empty; name another folder{advice}")
    elif os.path.lexists(path):
        raise InputError(f"{path} is no folder; name another place with --out")


class SavedTokenizer(Protocol):
    def save(self, folder: Path) -> None: ...


class TokenizedData(Protocol):
    """The tokens of a run as its folder records them: origin, hashes and tokenizer (`data.tokens.TokenData`)."""

    @property
    def provenance(self) -> dict[str, Any]: ...

    @property
    def tokenizer(self) -> SavedTokenizer: ...


class Tracker(Protocol):
    """Receiver of the rows that also go to `metrics.jsonl`."""

    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


def read_run(path: Path, values: dict[str, Any]) -> RunConfig:
    """Return a run's config from the values of its `config.yaml`.

    The model that a run started from may be gone: once the run's folder has a copy of the tokenizer, that is used.
    """
    if missing := [name for name in ("model", "data", "phases") if name not in values]:
        raise InputError(f"{path / CONFIG} is not the whole config of a run: it has no {missing[0]}; restore a copy")
    run = validate(RunConfig, values)
    own = path / TOKENIZER
    if run.start is None or not own.is_dir():
        return run
    return run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": str(own.resolve())})})


def rank_zero_only(method: Callable[Concatenate[RunFolder, P], None]) -> Callable[Concatenate[RunFolder, P], None]:
    """Run a method on rank 0 only; do nothing on the other ranks."""

    @wraps(method)
    def call(folder: RunFolder, *arguments: P.args, **options: P.kwargs) -> None:
        if folder.world.rank == 0:
            method(folder, *arguments, **options)

    return call


@dataclass(frozen=True)
class Position:
    """State of a run to resume from. A phase starts without optimizer state."""

    config: ModelConfig
    state: TrainerState
    weights: Arrays
    optimizer_state: Arrays | None


@dataclass
class RunFolder:
    """A run's folder. Methods that write raise InputError, naming the last checkpoint, if the disk refuses."""

    path: Path
    world: ProcessGroup = SingleProcess()
    tracker: Tracker | None = None
    lock: int | None = None  # a file descriptor
    warn: Callable[[str], None] | None = None  # gets a line for log rows that could not be read

    def open(self) -> RunConfig:
        """Return the config of a run to resume. Raises InputError if there is none."""
        if self._is_ours and not (self.path / CONFIG).is_file():
            raise InputError(f"cannot resume {self.path}: there is no {CONFIG} in it; name a run's folder")
        return read_run(self.path, self._broadcast(lambda: read_mapping(self.path / CONFIG)))

    def identity(self) -> RunIdentity | None:
        """Return how the run is trained; None if it has not begun, or predates this file."""
        saved = self._broadcast(self._identity)
        return None if saved is None else validate(RunIdentity, saved)

    def _identity(self) -> dict[str, Any] | None:
        if not (self.path / CONFIG).is_file():  # without a config, the identity is left from a run killed at its start
            return None
        found = read_identity(self.path)
        return None if found is None else found.model_dump(mode="json")

    @property
    def is_begun(self) -> bool:
        """Return whether the folder contains a run."""
        return bool(self._broadcast(lambda: (self.path / CONFIG).is_file()))

    def check_data(self, data: TokenizedData) -> None:
        """Raise InputError if the tokens differ from those that the run began with: its weights would not fit them."""
        hashes = [data.provenance[split]["sha256"] for split in ("train", "validation")]
        if hashes != self._broadcast(lambda: hashes):
            raise InputError(
                f"process {self.world.rank} has other tokens than process 0; give all of them the same text, tokenizer "
                "and version of mlxmoe"
            )
        if not self._is_ours:
            return
        if not (self.path / DATA).is_file():
            if self.warn is not None and checkpoint.latest(self.path) is not None:
                self.warn(f"{self.path / DATA} is missing, so it cannot be checked that the tokens are unchanged")
            return
        before = read_record(Provenance, self.path / DATA)
        if [before.train.sha256, before.validation.sha256] != hashes:
            source = data.provenance["source"]["description"]
            raise InputError(
                f"cannot resume {self.path}: {source} gives other tokens than the run began with ({DATA}); "
                "restore the text and the tokenizer, or begin another run"
            )

    def acquire_lock(self) -> None:
        """Lock the folder until `close` or the process's end. Raises InputError if another process holds it."""
        if not self._is_ours or self.lock is not None or not self.path.is_dir():
            return
        try:
            self.lock = locks.acquire(self.path)
        except locks.Busy:
            raise InputError(f"another process is training in {self.path}; wait for it, or stop it first") from None

    def check_not_begun(self) -> None:
        """Raise InputError if another process has begun a run in the folder meanwhile."""
        if self.is_begun:
            raise self._taken()

    @rank_zero_only
    def write_metadata(
        self,
        run: RunConfig,
        identity: RunIdentity,
        data: TokenizedData,
        environment: dict[str, Any],
        is_new: bool = False,
    ) -> None:
        """Write a new run's metadata. Once identity and config are on disk, a killed run can be resumed.

        Raises InputError if the run `is_new` and another has begun in its place.
        """
        with self._writing():
            make_folder(self.path)
            self.acquire_lock()
            if is_new and (self.path / CONFIG).is_file():  # from a process that ended before this one got the lock
                raise self._taken()
            for folder in (self.path, self.path / "boundaries"):
                clean_leftovers(folder)
            self._write_json(IDENTITY, identity.model_dump(mode="json"))
            if not (self.path / CONFIG).is_file():  # an existing config may carry the user's notes
                try:
                    with replacing(self.path / CONFIG) as partial:
                        configs.save(run, partial)
                finally:
                    if not (self.path / CONFIG).exists():  # an identity without a config is of no use
                        (self.path / IDENTITY).unlink()
            if not (self.path / TOKENIZER).is_dir():
                with new_folder(self.path / TOKENIZER) as partial:
                    if run.start is None:
                        data.tokenizer.save(partial)
                    else:  # including whatever came with the model
                        copy_tokenizer(Path(run.data.tokenizer), partial)
            self._write_json(DATA, data.provenance)
            self._write_json(ENVIRONMENT, environment)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def metrics(self) -> list[dict[str, Any]]:
        return self._broadcast(lambda: jsonl.read(self.path / METRICS, MetricsRow, self.warn))

    def history(self) -> list[dict[str, Any]]:
        return self._broadcast(lambda: jsonl.read(self.path / HISTORY, HistoryRow, self.warn))

    @rank_zero_only
    def log_step(self, row: dict[str, Any]) -> None:
        with self._writing():
            jsonl.append(self.path / METRICS, row)
        if self.tracker is not None:
            self.tracker.log(row)

    @rank_zero_only
    def log_event(self, row: dict[str, Any]) -> None:
        with self._writing():
            jsonl.append(self.path / HISTORY, row)

    @rank_zero_only
    def truncate_after(self, phase: int, step: int) -> None:
        """Drop the rows after a step, so that none occurs twice."""
        with self._writing():
            jsonl.truncate_after(self.path / METRICS, phase, step, MetricsRow)
            jsonl.truncate_after(self.path / HISTORY, phase, step, HistoryRow)

    @rank_zero_only
    def drop_result(self, phase: int) -> None:
        """Drop the result of a finished phase that is to be trained further."""
        with self._writing():
            jsonl.keep(self.path / HISTORY, lambda row: (row["event"], row["phase"]) != ("phase", phase), HistoryRow)

    @rank_zero_only
    def truncate_metrics(self, phase: int) -> None:
        """Drop the metrics of a phase that starts over."""
        with self._writing():
            jsonl.truncate_after(self.path / METRICS, phase, -1, MetricsRow)

    def save_boundary(self, name: str, record: dict[str, Any]) -> Path:
        file = self.path / "boundaries" / f"{name}.json"
        if self._is_ours:
            with self._writing():
                make_folder(file.parent)
                self._write_json(f"boundaries/{name}.json", record)
        return file

    @rank_zero_only
    def save_samples(self, text: str) -> None:
        with self._writing(), replacing(self.path / SAMPLES) as partial:
            partial.write_text(text, encoding="utf-8")

    @rank_zero_only
    def save(
        self, config: ModelConfig, state: TrainerState, weights: Weights, optimizer_state: Weights | None, keep: int
    ) -> None:
        """Save a checkpoint and prune its phase to the last few, the best and step 0."""
        path = checkpoint.folder(self.path, state.phase_folder, state.step)
        with self._writing():
            for name in (METRICS, HISTORY):  # a checkpoint on disk implies the rows that lead to it
                if (self.path / name).exists():
                    flush(self.path / name)
            try:
                checkpoint.save(path, config, state, weights, optimizer_state)
            except InputError as error:
                raise InputError(f"{error}; {self._remedy()}") from None
            checkpoint.keep_last(path.parent, keep)

    @property
    def keeps_checkpoints(self) -> bool:
        return True

    def best_validation_loss(self, phase: str) -> float:
        """Return the lowest validation loss in a phase's folder, nats per token; inf before the first."""
        folder = checkpoint.folder(self.path, phase, 0).parent
        loss: float = self._broadcast(lambda: checkpoint.best_validation_loss(folder))
        return loss

    def load_latest(self, warn: Callable[[str], None]) -> Position | None:
        """Return the state of the run's last undamaged checkpoint; None if there is none."""
        with self._writing():
            saved = checkpoint.load_latest(self.path, warn) if self._is_ours else None
        if not self._broadcast(lambda: saved is not None):
            return None
        config = validate(ModelConfig, self._broadcast(lambda: saved.config.model_dump(mode="json") if saved else {}))
        state = validate(TrainerState, self._broadcast(lambda: asdict(saved.state) if saved else {}))
        weights, optimizer_state = (saved.weights, saved.optimizer_state) if saved else (None, None)
        has_moments = self._broadcast(lambda: optimizer_state is not None)
        return Position(config, state, self._arrays(weights), self._arrays(optimizer_state) if has_moments else None)

    def last_saved(self) -> str:
        """Describe the last checkpoint, for the line that explains why a run stopped."""
        saved = checkpoint.latest(self.path)
        return f"the last checkpoint is {saved.relative_to(self.path)}" if saved else "there is no checkpoint yet"

    @property
    def resume_advice(self) -> str:
        """Return how to resume, for the line that explains why a run stopped."""
        return f"resume with: {self.resume_command}"

    @property
    def resume_command(self) -> str:
        """Return the command that resumes the run."""
        if self.world.size == 1:
            return resume_command(self.path)
        return f"{resume_command(self.path)} under the launcher, with {self.world.size} processes as before"

    @property
    def _is_ours(self) -> bool:
        return self.world.rank == 0

    def _broadcast(self, read: Callable[[], Any]) -> Any:
        """Read on rank 0 and broadcast the result."""
        if self.world.size == 1:
            return read()
        return json.loads(self.world.broadcast(json.dumps(read()).encode() if self._is_ours else b""))

    def _arrays(self, arrays: Weights | None) -> Arrays:
        if self.world.size == 1:
            return dict(arrays or {})
        shapes = self._broadcast(lambda: {name: array.shape for name, array in (arrays or {}).items()})
        told = {name: self.world.broadcast(arrays[name].tobytes() if arrays else b"") for name in shapes}
        return {name: np.frombuffer(told[name], np.float32).reshape(shape) for name, shape in shapes.items()}

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        with replacing(self.path / name) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            about = culprit(error, self.path)
            raise InputError(f"cannot write {about}: {error.strerror or error}; {self._remedy()}") from None

    def _taken(self) -> InputError:
        return InputError(f"{self.path} has become a run in the meantime; name another folder")

    def _remedy(self) -> str:
        if not (self.path / CONFIG).is_file():
            return "nothing was begun; name another folder with --out"
        return f"{self.last_saved()}; once that is fixed, resume with: {self.resume_command}"
