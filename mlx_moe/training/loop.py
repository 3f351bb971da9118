"""One phase: batches in, steps, and what is logged, evaluated and saved on the way."""

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
from mlx_moe.config import PhaseConfig, RunConfig
from mlx_moe.data.tokens import TokenData, batch, fixed_windows
from mlx_moe.storage.checkpoint import TrainerState
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.backend import Backend, StepMetrics, Tokens, Trainer, peak_flops_per_s
from mlx_moe.training.boundary import lineage
from mlx_moe.training.console import Console
from mlx_moe.training.schedule import learning_rate
from mlx_moe.training.stopping import Interruption, TrainingStopped

DRAWN_WITH = "model.init_std, phases.moe.router_std, phases.moe.noise"
TITLES = {1: "Phase 1: dense", 2: "Phase 2: mixture of experts", 3: "Phase 3: larger mixture of experts"}


@dataclass(frozen=True)
class Phase:
    """Phase 1, 2 or 3 of a run; `from_scratch`: its first model has experts already."""

    number: int
    config: PhaseConfig
    from_scratch: bool = False

    @property
    def title(self) -> str:
        return "Phase 1: mixture of experts from scratch" if self.from_scratch else TITLES[self.number]


def train_phase(
    run: RunConfig,
    phase: Phase,
    trainer: Trainer,
    data: TokenData,
    folder: RunFolder,
    step: int,
    console: Console,
    backend: Backend,
    interruption: Interruption,
) -> None:
    """Train from `step` to the phase's end.

    Every `log_every` steps a row goes to `metrics.jsonl`, every `eval_every` the validation loss with it; a checkpoint
    is saved every `checkpoint_every` steps, after the last, and where the validation loss is the lowest so far. The
    device is waited for only then. An interruption finishes the step and saves. Raises TrainingStopped on it, and on a
    loss that is not finite; what is not finite is never saved. Raises InputError where the disk takes no more.
    """
    training, context_length = run.training, trainer.config.context_length
    validation = fixed_windows(data.validation, training.eval_sequences, context_length)
    lowest = folder.best_validation_loss(phase.number)
    flops = flops_per_token(trainer.config)
    peak_flops = trainer.world.size * peak_flops_per_s(backend, trainer.precision.name, trainer.device)
    if step == 0:
        folder.rewind_metrics(phase.number)  # what an earlier try wrote before its first checkpoint
        loss = _validation_loss(folder, phase, step, trainer, validation, training.batch_size)
        folder.log_step({"phase": phase.number, "step": 0, "validation_loss": loss})
    if interruption.came(trainer.world):
        raise interruption.stopped(f"before step {step + 1} of phase {phase.number}; {_go_on(folder)}")
    stopwatch = _Stopwatch(step)
    with console.progress(phase.title, phase.config.steps, step) as advance:
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
            to_save = step % training.checkpoint_every == 0 or is_last
            row: dict[str, Any] = {}
            if to_log or to_evaluate:
                metrics = pending()
                seconds = stopwatch.seconds_per_step(step)
                if not math.isfinite(metrics.loss):
                    raise _not_finite(folder, phase, step, f"loss became {metrics.loss}")
                memory = trainer.peak_memory_bytes()
                row = _row(phase, step, metrics, rate, tokens.shape, seconds, memory, flops, peak_flops)
            if to_evaluate:
                with stopwatch.stopped():
                    loss = _validation_loss(folder, phase, step, trainer, validation, training.batch_size)
                row["validation_loss"] = loss
                to_save = to_save or loss < lowest
                lowest = min(loss, lowest)
            if row:
                folder.log_step(row)
                console.step(row, phase.config.steps)
            advance(step, row)
            if interruption.came(trainer.world):
                console.line(f"{interruption.name}: saving; a second one ends at once")
                to_save = True
            if to_save:
                origin = lineage(run, phase.number)
                state = TrainerState(phase.number, step, backend.name, row.get("validation_loss"), origin)
                _save(folder, phase, trainer, state, training.keep_checkpoints, stopwatch)
                if interruption.came(trainer.world):  # one that comes later is seen, and saved for, in the next step
                    raise interruption.stopped(f"after step {step} of phase {phase.number} and saved; {_go_on(folder)}")


def evaluate(trainer: Trainer, windows_NT1: Tokens, batch_size: int) -> float:
    """Mean cross entropy over fixed windows, nats per token."""
    starts = range(0, len(windows_NT1), batch_size)
    losses = [trainer.loss(windows_NT1[start : start + batch_size]) for start in starts]
    sizes = [len(windows_NT1[start : start + batch_size]) for start in starts]
    return float(np.average(losses, weights=sizes))


def load_imbalance(expert_load_LE: NDArray[np.float32]) -> float:
    """The busiest expert's load over the mean, in the layer where it is largest; 1 is perfect balance."""
    return float((expert_load_LE.max(axis=1) * expert_load_LE.shape[1]).max())


def _row(
    phase: Phase,
    step: int,
    metrics: StepMetrics,
    rate: float,
    batch_shape: tuple[int, ...],
    seconds_per_step: float,
    peak_memory_bytes: int,
    flops: Flops,
    peak_flops: float,
) -> dict[str, Any]:
    tokens_per_step = batch_shape[0] * (batch_shape[1] - 1)
    tokens_per_s = tokens_per_step / seconds_per_step
    row = {
        "phase": phase.number,
        "step": step,
        "loss": metrics.loss,
        "cross_entropy": metrics.cross_entropy,
        "auxiliary_loss": metrics.loss - metrics.cross_entropy,
        "learning_rate": rate,
        "grad_norm": metrics.grad_norm if math.isfinite(metrics.grad_norm) else None,  # a step that fp16 left out
        "tokens": step * tokens_per_step,
        "tokens_per_s": round(tokens_per_s),
        "step_ms": round(seconds_per_step * 1e3, 2),
        "mfu": float(f"{mfu(flops, tokens_per_s, peak_flops):.4g}"),
        "peak_memory_bytes": peak_memory_bytes,
    }
    if metrics.expert_load_LE is not None:
        row["expert_load"] = np.round(metrics.expert_load_LE, 5).tolist()
        row["load_imbalance"] = round(load_imbalance(metrics.expert_load_LE), 3)
    if metrics.router_entropy_L is not None:
        row["router_entropy"] = np.round(metrics.router_entropy_L, 5).tolist()
    return row


def _validation_loss(
    folder: RunFolder, phase: Phase, step: int, trainer: Trainer, windows_NT1: Tokens, batch_size: int
) -> float:
    loss = evaluate(trainer, windows_NT1, batch_size)
    if not math.isfinite(loss):
        raise _not_finite(folder, phase, step, f"validation loss became {loss}")
    return loss


def _save(
    folder: RunFolder, phase: Phase, trainer: Trainer, state: TrainerState, keep: int, stopwatch: _Stopwatch
) -> None:
    weights, optimizer_state = trainer.lazy_state()
    with stopwatch.stopped():
        for name, arrays in {"weights": weights, "optimizer's moments": optimizer_state}.items():
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise _not_finite(folder, phase, state.step, f"{name} are no longer finite")
        folder.save(trainer.config, state, weights, optimizer_state, keep)


class _Stopwatch:
    """Times the steps, and leaves out what is said not to be one."""

    def __init__(self, step: int):
        self._step, self._since = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """The mean since the last call."""
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


def _go_on(folder: RunFolder) -> str:
    return f"resume with: {folder.resume_command}"


def _not_finite(folder: RunFolder, phase: Phase, step: int, what: str) -> TrainingStopped:
    folder.log_event({"event": "diverged", "phase": phase.number, "step": step, "reason": f"the {what}"})
    remedy = (
        f"lower the learning rate (phases.*.learning_rate {phase.config.learning_rate:g}) or raise its warmup_steps"
    )
    if step == 0:
        remedy = f"the weights it begins with are too large: lower what drew them ({DRAWN_WITH})"
    return TrainingStopped(
        f"the {what} at step {step} of phase {phase.number}; {folder.last_saved()}; {remedy}", exit_code=1
    )
