"""Routers initialised at centroids of the router inputs on some text."""

from __future__ import annotations

from mlx_moe.config import UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.training.backend import StreamedModel, Tokens
from mlx_moe.transfer.centroids import Routers, centroid_rows
from mlx_moe.transfer.moe_layout import experts_of

CENTROID_TOKENS = 4096
TOKENS_PER_CENTROID = 16  # minimum


def centroid_tokens(phase: UpcyclePhaseConfig) -> int:
    """Return the number of tokens to compute centroids from."""
    return max(CENTROID_TOKENS, TOKENS_PER_CENTROID * phase.n_experts)


def centroid_routers(model: StreamedModel, phase: UpcyclePhaseConfig, tokens_BT: Tokens, seed: int) -> Routers:
    """Return a router for every layer that gets experts in a phase, from clusters of its inputs on these tokens.

    Raises InputError for too few tokens.
    """
    if tokens_BT.size < TOKENS_PER_CENTROID * phase.n_experts:
        raise InputError(
            f"{tokens_BT.size} tokens are too few for the centroids of {phase.n_experts} experts; give at least "
            f"{TOKENS_PER_CENTROID * phase.n_experts}"
        )
    upcycled = model.config.model_copy(update={"moe": experts_of(model.config, phase)})
    inputs = model.ffn_inputs(tokens_BT, upcycled.expert_layers)
    return {
        layer: centroid_rows(x_ND, phase.n_experts, seed)
        for layer, x_ND in zip(upcycled.expert_layers, inputs, strict=True)
    }
