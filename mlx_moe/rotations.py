"""RoPE's rotation frequencies."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig


def rotation_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Radians per position, (head_dim / 2,), for the pairs of coordinates i and i + head_dim / 2 (Su et al. 2021).

    Scaled: low frequencies are divided by the factor, high ones kept, and those between interpolated (Chen et al. 2023,
    Position Interpolation, scale all of them; Grattafiori et al. 2024 and Llama 3.1's `apply_scaling`).
    """
    pairs = np.arange(config.head_dim // 2)
    frequencies: NDArray[np.float64] = config.rope_theta ** (-2 * pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
