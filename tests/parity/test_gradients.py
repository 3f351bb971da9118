"""The gradients derived by hand against finite differences of the oracle."""

import numpy as np
import pytest
from support.small_models import rough_weights, small_model

from mlx_moe.config import MoEConfig
from mlx_moe.presets import preset_names
from parity.gradients import loss_and_gradients
from parity.numpy_model import NumpyModel

STEP = 1e-4
EXPERTS = MoEConfig(n_experts=3, top_k=2, load_balance_coefficient=0.3, z_loss_coefficient=0.2)
SIZE = {"d_model": 8, "n_heads": 2, "d_ff": 12, "vocab_size": 16, "context_length": 7, "n_layers": 1}
OPTIONS = [
    *({"architecture": name} for name in preset_names("architectures") if name != "smollm"),
    {"architecture": "llama", "n_kv_heads": 1, "n_layers": 2},
    {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True, "attention_bias": "qkv"},
    {"architecture": "gpt2", "position_encoding": "rope", "qk_norm": True},
    {"architecture": "simple", "activation": "leaky_relu", "weight_tying": False},
    {"architecture": "simple", "normalization": "layernorm_nobias", "activation": "gelu_tanh"},
]


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_every_gradient(fields, moe):
    """Along a random direction in each tensor; differences of the fourth order, exact but for 1e-11."""
    fields = {**SIZE, **fields}
    config = small_model(fields.pop("architecture"), moe=moe, **fields)
    weights = {name: array.astype(np.float64) for name, array in rough_weights(config, seed=1).items()}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, 8)).astype(np.int32)
    _, gradients = loss_and_gradients(NumpyModel(config, weights), tokens)
    assert set(gradients) == set(weights)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        direction /= np.linalg.norm(direction)

        def at(step, name=name, direction=direction):
            moved = NumpyModel(config, weights | {name: weights[name] + step * STEP * direction})
            return loss_and_gradients(moved, tokens)[0]

        slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
        assert (gradient * direction).sum() == pytest.approx(slope, abs=1e-10), name
