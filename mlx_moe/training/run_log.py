"""Destinations of what training logs and saves: a run's folder, or memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Weights
from mlx_moe.storage.checkpoint import TrainerState


class RunLog(Protocol):
    """Log of a training; `storage.run_folder.RunFolder` is one. All losses in nats per token."""

    @property
    def keeps_checkpoints(self) -> bool:
        """Return whether `save` keeps what it gets; if not, a new lowest validation loss needs no checkpoint."""

    def best_validation_loss(self, phase: str) -> float:
        """Return the lowest validation loss among a phase's checkpoints; inf before the first."""

    def truncate_metrics(self, phase: int) -> None:
        """Drop the rows of a phase that starts over."""

    def log_step(self, row: dict[str, Any]) -> None:
        """Append a row of metrics."""

    def log_event(self, row: dict[str, Any]) -> None:
        """Append a row of history: a finished phase, a boundary, or a divergence."""

    def save(
        self, config: ModelConfig, state: TrainerState, weights: Weights, optimizer_state: Weights | None, keep: int
    ) -> None:
        """Save a checkpoint."""

    def last_saved(self) -> str:
        """Describe the last checkpoint, for the line that explains why training stopped."""

    @property
    def resume_advice(self) -> str:
        """Return how to resume, for the line that explains why training stopped."""


@dataclass
class MemoryLog:
    """A log in memory; it keeps no checkpoints."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def keeps_checkpoints(self) -> bool:
        return False

    def best_validation_loss(self, phase: str) -> float:
        return math.inf

    def truncate_metrics(self, phase: int) -> None:
        self.rows = [row for row in self.rows if row["phase"] < phase]

    def log_step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def log_event(self, row: dict[str, Any]) -> None:
        self.events.append(row)

    def save(
        self, config: ModelConfig, state: TrainerState, weights: Weights, optimizer_state: Weights | None, keep: int
    ) -> None:
        """Do nothing: the model stays in memory."""

    def last_saved(self) -> str:
        return "nothing was saved, because no folder was named"

    @property
    def resume_advice(self) -> str:
        return "nothing was saved, because no folder was named"
