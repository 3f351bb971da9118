"""Small models of every kind in both backends, with rough weights."""

import numpy as np
import pytest

from mlx_moe.config import EngineConfig, MoEConfig, OptimizerConfig
from mlx_moe.presets import preset_names
from mlx_moe.training.backend import choose_backend
from parity.small_models import (
    FOUR_EXPERTS,
    TOKENS,
    boundary_tokens,
    larger_model,
    probe_model,
    reference_tokens,
    rough_weights,
    small_model,
)

__all__ = [
    "BACKENDS",
    "FOUR_EXPERTS",
    "LIMIT_LOGITS",
    "MIXED",
    "TOKENS",
    "boundary_tokens",
    "build",
    "every_model",
    "larger_model",
    "largest_difference",
    "probe_model",
    "random_tokens",
    "reference_tokens",
    "rough_weights",
    "small_model",
]

BACKENDS = ("mlx", "torch")
MIXED = MoEConfig(n_experts=6, top_k=4, d_ff=32, shared_d_ff=48, layers=(1,))  # narrow, beside a shared one, in a layer
LIMIT_LOGITS = 1e-5  # of logits with a standard deviation near 0.4; rounding alone stays below 1e-6


def every_model(**fields):
    """Return test parameters for every architecture preset, dense and with experts."""
    return [
        pytest.param(small_model(name, moe=moe, **fields), id=f"{name}-{'experts' if moe else 'dense'}")
        for name in preset_names("architectures")
        for moe in (None, FOUR_EXPERTS)
    ] + [pytest.param(small_model("smollm", moe=MIXED, **fields), id="smollm-mixed")]


def build(backend, config, weights=None, optimizer=None, engine=None):
    """Return a trainer on CPU; by default with rough weights that depend on the config alone."""
    weights = rough_weights(config, seed=0) if weights is None else weights
    factory = choose_backend(backend).trainer
    return factory(config, weights, optimizer or OptimizerConfig(), "cpu", engine or EngineConfig())


def random_tokens(config, n_rows=2, n_columns=None, seed=0):
    shape = (n_rows, n_columns or config.context_length)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def largest_difference(one, other):
    assert one.shape == other.shape
    return np.abs(one - other).max()
