"""Memory checks of a run's phases, before they begin."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_moe.accounting.memory import step_memory
from mlx_moe.address_space import bytes_left
from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError
from mlx_moe.phases import trained_model
from mlx_moe.precision import choose_precision
from mlx_moe.training.backend import Backend

ESTIMATE_MARGIN = 1.1  # the estimate is accurate within a tenth


def needed_bytes(run: RunConfig, phase: int, backend: Backend, device: str) -> int:
    """Return the estimated peak bytes of a phase's step on a device (`auto`, `cpu`, `gpu`)."""
    chosen = backend.device.choose_device(device)
    precision = choose_precision(run.engine.precision, chosen, has_bf16=True).name
    engine = run.engine.model_copy(update={"precision": precision})
    work = trained_model(run, phase), run.optimizer, engine, run.training.batch_size
    return step_memory(*work, backend.name, chosen.kind).peak


def check_address_space(run: RunConfig, phases: Iterable[int], backend: Backend, device: str) -> None:
    """Raise InputError if a phase needs more memory than this process may map (`ulimit -v`).

    Checked in advance, because MLX crashes with a segmentation fault if memory is refused.
    """
    left = bytes_left()
    if left is None:
        return
    for phase in phases:
        needed = ESTIMATE_MARGIN * needed_bytes(run, phase, backend, device)
        if needed > left:
            raise InputError(
                f"phase {phase} will need about {needed / 1e9:.1f} GB of memory, and this process may take "
                f"{max(left, 0) / 1e9:.1f} GB more (ulimit -v); raise that limit, or lower training.batch_size "
                f"({run.training.batch_size})"
            )
