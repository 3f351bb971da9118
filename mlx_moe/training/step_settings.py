"""Settings, dropout seeds and metrics that the training steps of both backends share.

B batch, T time, L layers with experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.precision import PrecisionName
from mlx_moe.training.backend import StepMetrics


@dataclass(frozen=True)
class StepSettings:
    """A training step's configs, and the precision chosen for its device."""

    model: ModelConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    precision: PrecisionName

    @property
    def n_parts(self) -> int:
        """Number of parts of a process's batch whose gradients are accumulated."""
        return self.engine.accumulation_steps

    def part_seeds(self, dropout_seed: int, rank: int) -> list[int]:
        """Return a seed of dropout for each part of a process's batch; parts of other processes have others."""
        first = dropout_seed + rank * self.n_parts
        return list(range(first, first + self.n_parts))


def required(optimizer: OptimizerConfig | None) -> OptimizerConfig:
    """Return the optimizer's config. Raises InputError if the trainer was built without one."""
    if optimizer is None:
        raise InputError("this trainer has no optimizer; to train, build it with Trainer(config, weights, optimizer)")
    return optimizer


def step_metrics(
    losses: NDArray[np.float32], expert_load_LE: NDArray[np.float32] | None, grad_norm: float
) -> StepMetrics:
    """Return a step's metrics from its losses (2 + L,): loss, cross entropy, router entropies."""
    loss, cross_entropy, *_ = losses.tolist()
    if expert_load_LE is None:
        return StepMetrics(loss, cross_entropy, grad_norm)
    return StepMetrics(loss, cross_entropy, grad_norm, expert_load_LE, losses[2:])
