"""Our logits against mlx-lm's Llama and Mixtral with the same weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama, mixtral
from support.small_models import (
    BACKENDS,
    FOUR_EXPERTS,
    LIMIT_LOGITS,
    build,
    largest_difference,
    random_tokens,
    rough_weights,
    small_model,
)

from mlx_moe.config import MoEConfig


def arguments(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.weight_tying,
    }


def their_name(name):
    name = name.replace("mlp.router", "block_sparse_moe.gate").replace("mlp.experts", "block_sparse_moe.switch_mlp")
    return name if name == "lm_head.weight" else f"model.{name}"


def check(config, model):
    weights, tokens = rough_weights(config, seed=2), random_tokens(config)
    model.load_weights([(their_name(name), mx.array(array)) for name, array in weights.items()], strict=True)
    theirs = np.array(model(mx.array(tokens)))
    for backend in BACKENDS:
        assert largest_difference(build(backend, config, weights).logits(tokens), theirs) < LIMIT_LOGITS, backend


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2}, {"weight_tying": True}, {"bias": True}], ids=str)
def test_llama(fields, theta):
    config = small_model("llama", rope_theta=theta, **fields)
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    check(config, llama.Model(llama.ModelArgs("llama", **arguments(config), **biases)))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("moe", [FOUR_EXPERTS, MoEConfig(n_experts=8, top_k=3)], ids=str)
@pytest.mark.parametrize("weight_tying", [False, True])
def test_mixtral(moe, weight_tying, theta):
    config = small_model("llama", n_kv_heads=2, rope_theta=theta, weight_tying=weight_tying, moe=moe)
    experts = {"num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k}
    check(config, mixtral.Model(mixtral.ModelArgs("mixtral", **arguments(config), **experts)))
