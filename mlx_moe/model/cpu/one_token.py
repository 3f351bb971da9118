"""A decoding step on CPU: few numbers, so its time is the number of operations that MLX starts. h half of a head."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np


@lru_cache(maxsize=8)
def rotation(position: int, frequencies_h: tuple[float, ...]) -> tuple[mx.array, mx.array]:
    """Compute a position's rotary cosines and signed sines, (2, h) float32 each, once for all layers."""
    angles_h = position * np.array(frequencies_h)
    cos_h, sin_h = np.cos(angles_h), np.sin(angles_h)
    rotation = mx.array(np.stack([cos_h, cos_h]), mx.float32), mx.array(np.stack([-sin_h, sin_h]), mx.float32)
    mx.eval(rotation)
    return rotation


def rotate_token(x_BH1d: mx.array, cos_2h: mx.array, sin_2h: mx.array) -> mx.array:
    """Rotate a token's queries or keys, as `mx.fast.rope` does in three times as many operations."""
    x_BH12h = mx.unflatten(x_BH1d, -1, (2, -1))
    return (x_BH12h * cos_2h + x_BH12h[..., ::-1, :] * sin_2h).flatten(-2)
