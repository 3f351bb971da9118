"""Our logits against Hugging Face's Llama, Mixtral and GPT-2 with the same weights."""

import pytest
import torch
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
from support.their_weights import gpt2_weights, llama_config, llama_weights, mixtral_weights
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mlx_moe.config import MoEConfig


@torch.no_grad()
def their_logits(model, weights, tokens):
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=True)
    return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


def check(config, model, convert):
    weights, tokens = rough_weights(config, seed=1), random_tokens(config)
    theirs = their_logits(model, convert(config, weights), tokens)
    for backend in BACKENDS:
        assert largest_difference(build(backend, config, weights).logits(tokens), theirs) < LIMIT_LOGITS, backend


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "weight_tying": True},
        {"head_dim": 16, "n_layers": 3},
        {"norm_eps": 1e-2},
        {"bias": True},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": {"factor": 8.0, "original_context_length": 24, "high_freq_factor": 2.0}},
    ],
    ids=str,
)
def test_llama(fields, theta):
    config = small_model("llama", rope_theta=theta, **fields)
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    check(config, LlamaForCausalLM(LlamaConfig(**llama_config(config), **biases)), llama_weights)


def test_smollm():
    config = small_model("smollm")
    assert config.n_heads > config.n_kv_heads
    assert config.weight_tying
    check(config, LlamaForCausalLM(LlamaConfig(**llama_config(config))), llama_weights)


def test_qwen2():
    config = small_model("llama", n_kv_heads=2, attention_bias="qkv")
    check(config, Qwen2ForCausalLM(Qwen2Config(**llama_config(config))), llama_weights)


def test_qwen3():
    config = small_model("llama", n_kv_heads=2, head_dim=16, qk_norm=True, norm_eps=1e-2)
    check(config, Qwen3ForCausalLM(Qwen3Config(**llama_config(config))), llama_weights)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    "moe", [FOUR_EXPERTS, MoEConfig(n_experts=8, top_k=3), MoEConfig(n_experts=3, top_k=1)], ids=str
)
def test_mixtral(moe, theta):
    config = small_model("llama", n_kv_heads=2, rope_theta=theta, moe=moe)
    experts = {"num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k}
    check(config, MixtralForCausalLM(MixtralConfig(**llama_config(config), **experts)), mixtral_weights)


@pytest.mark.parametrize("fields", [{}, {"n_layers": 3, "n_heads": 3, "d_ff": 80, "norm_eps": 1e-2}], ids=str)
def test_gpt2(fields):
    config = small_model("gpt2", **fields)
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.d_ff,
        activation_function="gelu_new",
        layer_norm_epsilon=config.norm_eps,
    )
    check(config, GPT2LMHeadModel(theirs), gpt2_weights)


@pytest.mark.parametrize("fields", [{"rope_theta": 500_000.0}, {"norm_eps": 1e-4}, {"head_dim": 8}], ids=str)
def test_the_comparison_sees_what_it_compares(fields):
    config = small_model("llama")
    tokens = random_tokens(config)
    other = build("torch", small_model("llama", **fields)).logits(tokens)
    assert largest_difference(build("torch", config).logits(tokens), other) > 10 * LIMIT_LOGITS
