"""The logits of mlx-lm."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from mlx_moe.training.backend import Logits, Tokens


def logits(folder: Path, tokens_BT: Tokens) -> Logits:
    """Of the model in a folder, (B, T, V), in float32 on the CPU."""
    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        return np.array(model(mx.array(tokens_BT)))
