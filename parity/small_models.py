"""Small models of every architecture, on which small faults show, with their weights and tokens."""

from __future__ import annotations

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig, MoEConfig
from mlx_moe.parameters import Arrays, initialize, normal
from mlx_moe.presets import load_architecture
from mlx_moe.training.backend import Tokens
from mlx_moe.transfer.growth import grow_config

FOUR_EXPERTS = MoEConfig(n_experts=4)
SEQUENCES, TOKENS = 2, 128  # of the reference; one sequence for models of more parameters than SMALL_MODEL_PARAMETERS
SMALL_MODEL_PARAMETERS = 2_000_000


def small_model(architecture: str, **fields: object) -> ModelConfig:
    """Return an architecture preset at a size that any machine runs in milliseconds, without dropout."""
    heads = {"n_heads": 6, "n_kv_heads": 2} if architecture == "smollm" else {"n_heads": 4}
    size = {"vocab_size": 256, "context_length": 32, "d_model": 48, "n_layers": 2, "d_ff": 96, "dropout": 0.0}
    return load_architecture(architecture, **(size | heads | fields))


def probe_model(
    architecture: str, seed: int, moe: MoEConfig | None = None, **fields: object
) -> tuple[ModelConfig, Arrays]:
    """Return a small model on which small faults show, and its weights.

    A wrong θ rotates by an angle that grows with the position, so there are 128 positions, and queries and keys large
    enough for the scores to change. A wrong ε shows where the variance is small, as in the embeddings. The router
    weights of the last two experts are 0, so these tie exactly; all other experts differ.
    """
    experts = {"moe": moe.model_dump()} if moe else {}
    config = small_model(architecture, context_length=TOKENS, norm_eps=1e-6, **experts, **fields)
    weights = rough_weights(config, seed)
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] *= 4
        if name.endswith("router.weight"):
            weights[name][-2:] = 0
    return config, weights


def larger_model(config: ModelConfig) -> ModelConfig:
    """Return a config 1.5 times as wide and one block deeper; twice as wide and no deeper where only that is exact."""
    if config.norm_position == "post":
        return grow_config(config, d_model=2 * config.d_model, n_layers=config.n_layers)
    return grow_config(config, d_model=config.d_model * 3 // 2, n_layers=config.n_layers + 1)


def rough_weights(config: ModelConfig, seed: int) -> Arrays:
    """Return initial weights with noise on every number, so that no norm is trivial and no bias 0."""
    return {
        name: array + np.float32(0.05) * normal(f"{name} roughness", seed, array.shape)
        for name, array in initialize(config, seed).items()
    }


def boundary_tokens(config: ModelConfig, seed: int) -> Tokens:
    """Return random tokens (2, TOKENS / 2 + 1)."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, TOKENS // 2 + 1)).astype(np.int32)


def reference_tokens(config: ModelConfig, seed: int) -> Tokens:
    """Return random tokens (SEQUENCES, up to TOKENS); one sequence for models that are not small."""
    sequences = SEQUENCES if count_parameters(config).total <= SMALL_MODEL_PARAMETERS else 1
    shape = (sequences, min(TOKENS, config.context_length))
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)
