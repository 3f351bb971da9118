"""The interface that generation needs of a model. B batch, T time, V vocabulary."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig


class Decoder(Protocol):
    """A model with a key-value cache."""

    length: int  # tokens in the cache

    def __call__(self, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
        """Append tokens. Returns the logits (B, V) after the last one."""


class LanguageModel(Protocol):
    """A model that can generate: a `Trainer` of either backend."""

    config: ModelConfig

    def decoder(self) -> Decoder:
        """Return a decoder with an empty cache."""
