"""One phase: batches in, steps, and what is logged, evaluated and saved on the way."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import PhaseConfig, RunConfig
from mlx_moe.data.tokens import TokenData, batch, fixed_windows
from mlx_moe.training import checkpoint, log
from mlx_moe.training.backend import StepMetrics, Tokens, Trainer
from mlx_moe.training.checkpoint import TrainerState
from mlx_moe.training.console import Console
from mlx_moe.training.schedule import learning_rate


class TrainingStopped(Exception):
    """The run ended before its time; the message says why and how to go on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class PhaseResult:
    """Losses are mean cross entropies in nats per token; the first and last of training are single batches."""

    first_loss: float
    last_loss: float
    first_validation_loss: float
    last_validation_loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Phase:
    """Phase 1, 2 or 3 of a run."""

    number: int
    config: PhaseConfig

    @property
    def title(self) -> str:
        return (
            f"Phase {self.number}: "
            + {1: "dense", 2: "mixture of experts", 3: "larger mixture of experts"}[self.number]
        )


def train_phase(
    run: RunConfig,
    phase: Phase,
    trainer: Trainer,
    data: TokenData,
    directory: Path,
    step: int,
    console: Console,
    backend: str,
) -> None:
    """Train from `step` to the phase's end.

    Every `log_every` steps a row goes to `metrics.jsonl`, every `eval_every` the validation loss with it, every
    `checkpoint_every` a checkpoint. SIGINT and SIGTERM finish the step and save. Raises TrainingStopped on those, and
    on a loss that is not finite; weights that are not finite are never saved.
    """
    training, context_length = run.training, trainer.config.context_length
    validation = fixed_windows(data.validation, training.eval_sequences, context_length)
    metrics_file = directory / "metrics.jsonl"
    tokens_per_step = training.batch_size * context_length
    logged_at, logged_step = time.perf_counter(), step

    def save(done: int, validation_loss: float | None) -> None:
        path = checkpoint.folder(directory, phase.number, done)
        state = TrainerState(phase.number, done, backend, validation_loss)
        weights = trainer.weights()
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise _not_finite(directory, phase, done, "weights are no longer finite")
        checkpoint.save(path, trainer.config, state, weights, trainer.optimizer_state())
        checkpoint.keep_last(path.parent, training.keep_checkpoints)

    if step == 0:
        log.rewind(metrics_file, phase.number, -1)  # what an earlier try wrote before its first checkpoint
        log.append(
            metrics_file,
            {"phase": phase.number, "step": 0, "validation_loss": evaluate(trainer, validation, training.batch_size)},
        )
    with console.progress(phase.title, phase.config.steps, step) as advance, _signals() as received:
        while step < phase.config.steps:
            rate = learning_rate(phase.config, step)
            tokens = batch(
                data.train,
                seed=run.seed,
                phase=phase.number,
                step=step,
                batch_size=training.batch_size,
                context_length=context_length,
            )
            pending = trainer.step(tokens, rate, _dropout_seed(run.seed, phase.number, step))
            step += 1
            is_last = step == phase.config.steps
            to_log = step == 1 or step % training.log_every == 0 or is_last
            to_evaluate = step % training.eval_every == 0 or is_last
            row: dict[str, Any] = {}
            if to_log or to_evaluate:
                metrics = pending()
                now = time.perf_counter()
                seconds_per_step = (now - logged_at) / (step - logged_step)
                row = _row(phase, step, metrics, rate, tokens_per_step, seconds_per_step, trainer.peak_memory_bytes())
                if not math.isfinite(metrics.loss):
                    raise _not_finite(directory, phase, step, f"loss became {metrics.loss}")
            if to_evaluate:
                row["validation_loss"] = evaluate(trainer, validation, training.batch_size)
                if not math.isfinite(row["validation_loss"]):
                    raise _not_finite(directory, phase, step, f"validation loss became {row['validation_loss']}")
            if row:
                log.append(metrics_file, row)
                console.step(row, phase.config.steps)
                logged_at, logged_step = time.perf_counter(), step
            advance(step, row)
            if step % training.checkpoint_every == 0 or is_last or received:
                save(step, row.get("validation_loss"))
            if received:
                raise _interrupted(directory, phase, step, received[0])


def evaluate(trainer: Trainer, windows_NT1: Tokens, batch_size: int) -> float:
    """Mean cross entropy over fixed windows, nats per token."""
    starts = range(0, len(windows_NT1), batch_size)
    losses = [trainer.loss(windows_NT1[start : start + batch_size]) for start in starts]
    sizes = [len(windows_NT1[start : start + batch_size]) for start in starts]
    return float(np.average(losses, weights=sizes))


def phase_result(directory: Path, phase: int) -> PhaseResult:
    """What a finished phase came to, from its rows in `metrics.jsonl`."""
    rows = [row for row in log.read(directory / "metrics.jsonl") if row["phase"] == phase]
    steps = [row for row in rows if "loss" in row]
    validations = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return PhaseResult(
        first_loss=steps[0]["cross_entropy"],
        last_loss=steps[-1]["cross_entropy"],
        first_validation_loss=validations[0],
        last_validation_loss=validations[-1],
        tokens=steps[-1]["tokens"],
        seconds=sum(row["step_ms"] * (row["step"] - earlier["step"]) for earlier, row in pairwise(rows)) / 1e3,
    )


def load_imbalance(expert_load_LE: NDArray[np.float32]) -> float:
    """The busiest expert's load over the mean, in the layer where it is largest; 1 is perfect balance."""
    return float((expert_load_LE.max(axis=1) * expert_load_LE.shape[1]).max())


def _row(
    phase: Phase,
    step: int,
    metrics: StepMetrics,
    rate: float,
    tokens_per_step: int,
    seconds_per_step: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    row = {
        "phase": phase.number,
        "step": step,
        "loss": metrics.loss,
        "cross_entropy": metrics.cross_entropy,
        "learning_rate": rate,
        "grad_norm": metrics.grad_norm,
        "tokens": step * tokens_per_step,
        "tokens_per_s": round(tokens_per_step / seconds_per_step),
        "step_ms": round(seconds_per_step * 1e3, 2),
        "peak_memory_bytes": peak_memory_bytes,
    }
    if metrics.expert_load_LE is not None:
        row["expert_load"] = np.round(metrics.expert_load_LE, 5).tolist()
        row["load_imbalance"] = round(load_imbalance(metrics.expert_load_LE), 3)
    return row


def _dropout_seed(seed: int, phase: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, phase, step]).generate_state(1)[0])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step can finish first; a second one of them ends the program at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def _interrupted(directory: Path, phase: Phase, step: int, number: int) -> TrainingStopped:
    name = signal.Signals(number).name
    return TrainingStopped(
        f"{name}: stopped after step {step} of phase {phase.number} and saved; "
        f"go on with: mlxmoe train --resume {directory}",
        exit_code=128 + number,
    )


def _not_finite(directory: Path, phase: Phase, step: int, what: str) -> TrainingStopped:
    saved = checkpoint.latest(directory)
    last = f"the last checkpoint is {saved.relative_to(directory)}" if saved else "there is no checkpoint yet"
    return TrainingStopped(
        f"the {what} at step {step} of phase {phase.number}; {last}; lower the learning rate "
        f"(phases.*.learning_rate {phase.config.learning_rate:g}) or raise its warmup_steps",
        exit_code=1,
    )
