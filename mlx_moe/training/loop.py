"""Training loop of one phase: steps, logging, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.accounting.flops import Flops, flops_per_token, mfu
from mlx_moe.config import RunConfig
from mlx_moe.data.tokens import TokenSplits, batch, fixed_windows
from mlx_moe.phases import Phase, phase_state
from mlx_moe.storage.checkpoint import TrainerState
from mlx_moe.training.backend import Backend, StepMetrics, Tokens, Trainer, peak_flops_per_s
from mlx_moe.training.console import Console
from mlx_moe.training.run_log import RunLog
from mlx_moe.training.schedule import learning_rate
from mlx_moe.training.stopping import Interruption, TrainingStopped

DRAWN_WITH = ("router_std", "noise")  # settings of a phase that scale its random draws


@dataclass(frozen=True)
class Session:
    """Objects shared by all phases of a training."""

    run: RunConfig
    data: TokenSplits
    backend: Backend
    log: RunLog
    console: Console
    interruption: Interruption


def train_phase(session: Session, phase: Phase, trainer: Trainer, step: int) -> None:
    """Train a phase from `step` to its end.

    Every `log_every` steps a row is logged, every `eval_every` with the validation loss; a checkpoint is saved every
    `checkpoint_every` steps, after the last, and at each new lowest validation loss. The program waits for the device
    only then. An interruption finishes the step and saves. Raises TrainingStopped on it, and on a non-finite loss;
    non-finite weights are never saved. Raises InputError if the disk is full.
    """
    run, data, log, interruption = session.run, session.data, session.log, session.interruption
    training, context_length = run.training, trainer.config.context_length
    validation = fixed_windows(data.validation, training.eval_sequences, context_length)
    lowest = log.best_validation_loss(phase.folder)
    rates = _Rates.of(session.backend, trainer)
    if step == 0:
        log.truncate_metrics(phase.number)  # drop rows that an earlier attempt wrote before its first checkpoint
        loss = _validation_loss(log, phase, step, trainer, validation, training.batch_size)
        log.log_step({"phase": phase.number, "step": 0, "validation_loss": loss})
    if interruption.came(trainer.world):
        raise interruption.stopped(f"before step {step + 1} of phase {phase.number}; {log.resume_advice}")
    stopwatch = _Stopwatch(step)
    with session.console.progress(phase.title, phase.config.steps, step) as advance:
        while step < phase.config.steps:
            rate = learning_rate(phase.config, step)
            tokens_BT1 = batch(
                data.train,
                seed=run.seed,
                phase=phase.number,
                step=step,
                batch_size=training.batch_size,
                context_length=context_length,
            )
            fetch_metrics = trainer.step(tokens_BT1, rate, _dropout_seed(run.seed, phase.number, step))
            step += 1
            is_last = step == phase.config.steps
            to_log = step == 1 or step % training.log_every == 0 or is_last
            to_evaluate = step % training.eval_every == 0 or is_last
            to_save = step % training.checkpoint_every == 0 or is_last
            row: dict[str, Any] = {}
            if to_log or to_evaluate:
                metrics = fetch_metrics()
                seconds = stopwatch.seconds_per_step(step)
                if not math.isfinite(metrics.loss):
                    raise _not_finite(log, phase, step, f"loss became {metrics.loss}")
                row = {"phase": phase.number, "step": step, **_metrics(metrics, rate)}
                row |= rates.row(step, tokens_BT1.shape, seconds) | {"peak_memory_bytes": trainer.peak_memory_bytes()}
                row |= _routing(metrics)
            if to_evaluate:
                with stopwatch.stopped():
                    loss = _validation_loss(log, phase, step, trainer, validation, training.batch_size)
                row["validation_loss"] = loss
                to_save = to_save or (log.keeps_checkpoints and loss < lowest)
                lowest = min(loss, lowest)
            if row:
                log.log_step(row)
                session.console.step(row, phase.config.steps)
            advance(step, row)
            if interruption.came(trainer.world):
                session.console.line(f"{interruption.name}: saving; a second one ends at once")
                to_save = True
            if to_save:
                state = phase_state(run, phase, step, session.backend.name, row.get("validation_loss"))
                _save(log, phase, trainer, state, training.keep_checkpoints, stopwatch)
                if interruption.came(trainer.world):  # a later signal is handled in the next step
                    where = f"after step {step} of phase {phase.number} and saved"
                    raise interruption.stopped(f"{where}; {log.resume_advice}")


def evaluate(trainer: Trainer, windows_NT1: Tokens, batch_size: int) -> float:
    """Return the mean cross entropy over fixed windows, nats per token."""
    starts = range(0, len(windows_NT1), batch_size)
    losses = [trainer.loss(windows_NT1[start : start + batch_size]) for start in starts]
    sizes = [len(windows_NT1[start : start + batch_size]) for start in starts]
    return float(np.average(losses, weights=sizes))


def load_imbalance(expert_load_LE: NDArray[np.float32]) -> float:
    """Return the busiest expert's load over the mean, in the most imbalanced layer; 1 is perfect balance."""
    return float((expert_load_LE.max(axis=1) * expert_load_LE.shape[1]).max())


@dataclass(frozen=True)
class _Rates:
    """FLOPs of a trainer's step, and the peak rate of its devices."""

    flops: Flops
    peak_flops_per_s: float

    @staticmethod
    def of(backend: Backend, trainer: Trainer) -> _Rates:
        peak = trainer.world.size * peak_flops_per_s(backend, trainer.precision.name, trainer.device)
        return _Rates(flops_per_token(trainer.config), peak)

    def row(self, step: int, batch_shape: tuple[int, ...], seconds_per_step: float) -> dict[str, Any]:
        tokens_per_step = batch_shape[0] * (batch_shape[1] - 1)
        tokens_per_s = tokens_per_step / seconds_per_step
        return {
            "tokens": step * tokens_per_step,
            "tokens_per_s": round(tokens_per_s),
            "step_ms": round(seconds_per_step * 1e3, 2),
            "mfu": float(f"{mfu(self.flops, tokens_per_s, self.peak_flops_per_s):.4g}"),
        }


def _metrics(metrics: StepMetrics, rate: float) -> dict[str, Any]:
    return {
        "loss": metrics.loss,
        "cross_entropy": metrics.cross_entropy,
        "auxiliary_loss": metrics.loss - metrics.cross_entropy,
        "learning_rate": rate,
        "grad_norm": metrics.grad_norm if math.isfinite(metrics.grad_norm) else None,  # float16 skipped the step
    }


def _routing(metrics: StepMetrics) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if metrics.expert_load_LE is not None:
        row["expert_load"] = np.round(metrics.expert_load_LE, 5).tolist()
        row["load_imbalance"] = round(load_imbalance(metrics.expert_load_LE), 3)
    if metrics.router_entropy_L is not None:
        row["router_entropy"] = np.round(metrics.router_entropy_L, 5).tolist()
    return row


def _validation_loss(
    log: RunLog, phase: Phase, step: int, trainer: Trainer, windows_NT1: Tokens, batch_size: int
) -> float:
    loss = evaluate(trainer, windows_NT1, batch_size)
    if not math.isfinite(loss):
        raise _not_finite(log, phase, step, f"validation loss became {loss}")
    return loss


def _save(log: RunLog, phase: Phase, trainer: Trainer, state: TrainerState, keep: int, stopwatch: _Stopwatch) -> None:
    weights, optimizer_state = trainer.lazy_state()
    with stopwatch.stopped():
        for name, arrays in {"weights": weights, "optimizer's moments": optimizer_state}.items():
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise _not_finite(log, phase, state.step, f"{name} are no longer finite")
        log.save(trainer.config, state, weights, optimizer_state, keep)


class _Stopwatch:
    """Timer of the steps, stopped while other work runs."""

    def __init__(self, step: int):
        self._step, self._since = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """Return the mean since the last call."""
        now = time.perf_counter()
        seconds = (now - self._since) / (step - self._step)
        self._step, self._since = step, now
        return seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def _dropout_seed(seed: int, phase: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, phase, step]).generate_state(1)[0])


def _not_finite(log: RunLog, phase: Phase, step: int, what: str) -> TrainingStopped:
    log.log_event({"event": "diverged", "phase": phase.number, "step": step, "reason": f"the {what}"})
    rate = f"phases.{phase.name}.learning_rate {phase.config.learning_rate:g}"
    remedy = f"lower the learning rate ({rate}) or raise its warmup_steps"
    if step == 0:
        drawn_with = ["model.init_std"] if phase.is_from_scratch else []
        drawn_with += [f"phases.{phase.name}.{key}" for key in DRAWN_WITH if hasattr(phase.config, key)]
        remedy = "the weights it begins with are too large or not finite"
        remedy += f": lower what drew them ({', '.join(drawn_with)})" if drawn_with else "; take another model"
    return TrainingStopped(
        f"the {what} at step {step} of phase {phase.number}; {log.last_saved()}; {remedy}", exit_code=1
    )
