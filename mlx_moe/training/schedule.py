"""Learning-rate schedules."""

import math

from mlx_moe.config import PhaseConfig


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Return the learning rate of step 0, 1, …: linear warm-up, then decay to `final_lr_fraction` at the last step."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / phase.warmup_steps
    progress = min(1.0, (step - phase.warmup_steps) / max(1, phase.steps - 1 - phase.warmup_steps))
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[phase.schedule]
    floor = 1.0 if phase.schedule == "constant" else phase.final_lr_fraction
    return phase.learning_rate * (floor + (1.0 - floor) * remaining)
