"""How fast RoPE turns each pair of a head's coordinates."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import LinearScaling, ModelConfig


def rotation_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Radians per position, (head_dim / 2,), for the pairs of coordinates i and i + head_dim / 2 (Su et al. 2021).

    Scaling by `linear` divides them all by the factor (Chen et al. 2023, Position Interpolation). `llama3` leaves those
    that turn more than `high_freq_factor` times in the original context, divides those that turn less than
    `low_freq_factor` times, and blends between (Grattafiori et al. 2024, and Llama 3.1's `apply_scaling`).
    """
    pairs = np.arange(config.head_dim // 2)
    frequencies = config.rope_theta ** (-2 * pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling.factor
    if isinstance(scaling, LinearScaling):
        return slowed
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * slowed
