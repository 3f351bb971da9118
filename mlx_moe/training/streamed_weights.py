"""Weights of a model that is run a layer at a time. B batch, T time, D model, V vocabulary, L layers, N tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Weights
from mlx_moe.training.backend import Tokens


def embed(config: ModelConfig, weights: Weights, tokens_BT: Tokens) -> NDArray[np.float32]:
    """Return the embeddings of tokens, (B, T, D), with those of their positions where these are learned."""
    embedded_BTD: NDArray[np.float32] = weights["embed_tokens.weight"][tokens_BT]
    if config.position_encoding == "learned_absolute":
        embedded_BTD += weights["embed_positions.weight"][: tokens_BT.shape[1]]
    return embedded_BTD


def head(config: ModelConfig, weights: Weights) -> NDArray[np.float32]:
    """Return the weights of the head, (V, D); mapped, not copied, if they lie in a file as float32."""
    return weights["embed_tokens.weight" if config.weight_tying else "lm_head.weight"]


def forced_experts(config: ModelConfig, experts_LNK: NDArray[np.int64] | None) -> dict[int, NDArray[np.int64]]:
    """Return the experts (N, K) that replace the router's choice, by layer."""
    return {} if experts_LNK is None else dict(zip(config.expert_layers, experts_LNK, strict=True))
