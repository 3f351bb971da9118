"""A run's folder: all that a run writes while it goes, and what it reads back to go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_moe import config as configs
from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.data.tokens import SPLITS, TokenData
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays
from mlx_moe.training import checkpoint, log
from mlx_moe.training.checkpoint import Checkpoint, TrainerState
from mlx_moe.training.files import flush, make_folder, replacing, sweep
from mlx_moe.training.trackers import Tracker, open_tracker
from mlx_moe.validation import read_mapping, validate

CONFIG, DATA, ENVIRONMENT = "config.yaml", "data.json", "environment.json"
METRICS, HISTORY, SAMPLES = "metrics.jsonl", "history.jsonl", "samples.md"


@dataclass
class RunFolder:
    """Every method that writes raises InputError where the disk does not let it, and names the last checkpoint."""

    path: Path
    tracker: Tracker | None = None
    lock: int | None = None  # a file descriptor

    def open(self) -> RunConfig:
        """The config of a run to resume. Raises InputError where there is none."""
        if not (self.path / CONFIG).is_file():
            raise InputError(f"cannot resume {self.path}: there is no {CONFIG} in it; name a run's folder")
        return validate(RunConfig, read_mapping(self.path / CONFIG))

    def check_data(self, data: TokenData) -> None:
        """Raise InputError where a run began with other tokens: its weights would mean nothing for these."""
        if not (self.path / DATA).is_file():
            return
        before = read_mapping(self.path / DATA)
        if any(before[split]["sha256"] != data.provenance[split]["sha256"] for split in SPLITS):
            source = data.provenance["source"]["description"]
            raise InputError(
                f"cannot resume {self.path}: {source} gives other tokens than the run began with ({DATA}); put the "
                "text and the tokenizer back as they were, or begin another run"
            )

    def hold(self) -> None:
        """Keep other processes out until `close`, or the end of this one. Raises InputError where one is in already."""
        if self.lock is not None or not self.path.is_dir():
            return
        self.lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {self.path}; wait for it, or stop it first") from None

    def introduce(self, run: RunConfig, data: TokenData, environment: dict[str, Any]) -> None:
        """Write what the run is. The config comes first: from then on a killed run can be resumed."""
        with self._writing():
            make_folder(self.path)
            self.hold()
            for folder in (self.path, self.path / "boundaries"):
                sweep(folder)
            with replacing(self.path / CONFIG) as partial:
                configs.save(run, partial)
            with replacing(self.path / "tokenizer") as partial:
                data.tokenizer.save(partial)
            self._write_json(DATA, data.provenance)
            self._write_json(ENVIRONMENT, environment)

    def open_tracker(self, run: RunConfig, rows: list[dict[str, Any]], warn: Callable[[str], None]) -> None:
        """`rows`: what the tracker has got already."""
        self.tracker = open_tracker(run, self.path, rows, warn)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def metrics(self) -> list[dict[str, Any]]:
        return log.read(self.path / METRICS)

    def history(self) -> list[dict[str, Any]]:
        return log.read(self.path / HISTORY)

    def log_step(self, row: dict[str, Any]) -> None:
        with self._writing():
            log.append(self.path / METRICS, row)
        if self.tracker is not None:
            self.tracker.log(row)

    def log_event(self, row: dict[str, Any]) -> None:
        with self._writing():
            log.append(self.path / HISTORY, row)

    def rewind(self, phase: int, step: int) -> None:
        """Drop the rows after a step, so that nothing is there twice."""
        with self._writing():
            for name in (METRICS, HISTORY):
                log.rewind(self.path / name, phase, step)

    def rewind_metrics(self, phase: int) -> None:
        """Drop the rows of a phase that starts over."""
        with self._writing():
            log.rewind(self.path / METRICS, phase, -1)

    def save_boundary(self, name: str, record: dict[str, Any]) -> Path:
        with self._writing():
            make_folder(self.path / "boundaries")
            self._write_json(f"boundaries/{name}.json", record)
        return self.path / "boundaries" / f"{name}.json"

    def save_samples(self, text: str) -> None:
        with self._writing(), replacing(self.path / SAMPLES) as partial:
            partial.write_text(text, encoding="utf-8")

    def save(
        self, config: ModelConfig, state: TrainerState, weights: Arrays, optimizer_state: Arrays | None, keep: int
    ) -> None:
        """Save a checkpoint, and of its phase keep the last few, the best and the birth."""
        path = checkpoint.folder(self.path, state.phase, state.step)
        with self._writing():
            for name in (METRICS, HISTORY):  # no checkpoint without the rows that lead to it
                if (self.path / name).exists():
                    flush(self.path / name)
            try:
                checkpoint.save(path, config, state, weights, optimizer_state)
            except InputError as error:
                raise InputError(f"{error}; {self._way_out()}") from None
            checkpoint.keep_last(path.parent, keep)

    def best_validation_loss(self, phase: int) -> float:
        """The lowest of the phase's checkpoints, nats per token; infinite before the first."""
        return checkpoint.best_validation_loss(checkpoint.folder(self.path, phase, 0).parent)

    def load_latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        with self._writing():
            return checkpoint.load_latest(self.path, warn)

    def last_saved(self) -> str:
        """In words, for the line that says why a run stopped."""
        saved = checkpoint.latest(self.path)
        return f"the last checkpoint is {saved.relative_to(self.path)}" if saved else "there is no checkpoint yet"

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        with replacing(self.path / name) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; {self._way_out()}") from None

    def _way_out(self) -> str:
        if not (self.path / CONFIG).is_file():
            return "nothing was begun; name another folder with --out"
        return f"{self.last_saved()}; go on, once this is mended, with: mlxmoe train --resume {self.path}"
