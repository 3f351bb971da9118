"""The reference against others' models, in float64."""

import numpy as np
import pytest
import torch
from support.small_models import probe_model, rough_weights, small_model
from support.their_weights import gpt2_weights, llama_config, llama_weights, mixtral_weights
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import torch_ref.attention
import torch_ref.transformer
from mlx_moe.config import COMPONENTS, MoEConfig
from mlx_moe.presets import preset_names
from parity.numpy_model import NumpyModel, best_experts

LIMIT = 1e-12  # of logits with a standard deviation near 0.4
EXPERTS = MoEConfig(n_experts=5, top_k=2)


@pytest.fixture
def in_float64(monkeypatch):
    """Lift what casts down to float32 on purpose: norms, softmaxes, frequencies."""
    default = torch.get_default_dtype()
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    torch_ref.attention._rotation_table.cache_clear()
    yield
    torch_ref.attention._rotation_table.cache_clear()
    torch.set_default_dtype(default)


def tokens_of(config, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, config.context_length)).astype(np.int32)


def distance(config, weights, model, theirs):
    tensors = {name: torch.tensor(array, dtype=torch.float64) for name, array in theirs.items()}
    model.double().load_state_dict(tensors, strict=True)
    with torch.no_grad():
        logits_BTV = model.eval()(torch.from_numpy(tokens_of(config)).long()).logits.numpy()
    assert logits_BTV.dtype == np.float64
    return np.abs(NumpyModel(config, weights)(tokens_of(config)).logits_BTV - logits_BTV).max()


LLAMA3 = {"factor": 8.0, "original_context_length": 24, "high_freq_factor": 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 2, "rope_theta": 500_000.0, "weight_tying": True},
        {"rope_theta": 100.0, "rope_scaling": LLAMA3},
    ],
    ids=str,
)
def test_llama(fields, in_float64):
    config = small_model("llama", **fields)
    weights = rough_weights(config, seed=1)
    theirs = LlamaForCausalLM(LlamaConfig(**llama_config(config)))
    assert distance(config, weights, theirs, llama_weights(config, weights)) < LIMIT


def test_qwen3(in_float64):
    config = small_model("llama", n_kv_heads=2, head_dim=16, qk_norm=True, norm_eps=1e-2)
    weights = rough_weights(config, seed=1)
    theirs = Qwen3ForCausalLM(Qwen3Config(**llama_config(config)))
    assert distance(config, weights, theirs, llama_weights(config, weights)) < LIMIT


def test_mixtral(in_float64):
    config = small_model("llama", n_kv_heads=2, moe=EXPERTS)
    weights = rough_weights(config, seed=1)
    theirs = MixtralForCausalLM(
        MixtralConfig(**llama_config(config), num_local_experts=EXPERTS.n_experts, num_experts_per_tok=EXPERTS.top_k)
    )
    theirs.set_experts_implementation("eager")  # grouped products know no float64
    assert distance(config, weights, theirs, mixtral_weights(config, weights)) < LIMIT


def test_gpt2(in_float64):
    config = small_model("gpt2")
    weights = rough_weights(config, seed=1)
    sizes = {"n_embd": config.d_model, "n_layer": config.n_layers, "n_head": config.n_heads, "n_inner": config.d_ff}
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        layer_norm_epsilon=config.norm_eps,
        activation_function="gelu_new",
        **sizes,
    )
    assert distance(config, weights, GPT2LMHeadModel(theirs), gpt2_weights(config, weights)) < LIMIT


OPTIONS = [
    *({kind: name} for kind, names in COMPONENTS.items() for name in names),
    *({"norm_position": name} for name in ("pre", "post")),
    *({name: value} for name in ("bias", "weight_tying") for value in (True, False)),
    {"n_kv_heads": 2, "head_dim": 6},
    {"qk_norm": True, "norm_eps": 1e-2},
    {"attention_bias": "qkv"},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": LLAMA3},
]
MIXED = MoEConfig(n_experts=5, top_k=2, d_ff=33, shared_d_ff=17, layers=(1,))


@pytest.mark.parametrize("moe", [None, EXPERTS, MIXED], ids=["dense", "experts", "mixed"])
@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_every_option(fields, moe, in_float64):
    """Against PyTorch's side. Its grouped products know no float64, so the width is one that goes without."""
    config = small_model("simple", moe=moe, **{"d_ff": 97, **fields})
    weights, tokens = rough_weights(config, seed=2), tokens_of(config)
    model = torch_ref.transformer.Transformer(config).double()
    model.load_state_dict({name: torch.tensor(array).double() for name, array in weights.items()})
    trace = NumpyModel(config, weights)(tokens)
    experts = dict(zip(config.expert_layers, torch.from_numpy(trace.experts_LNK), strict=True))
    with torch.no_grad():
        logits_BTV, _ = model(torch.from_numpy(tokens).long(), experts=experts, dtype=torch.float64)
    assert np.abs(trace.logits_BTV - logits_BTV.numpy()).max() < LIMIT
    for layer, experts_NK in enumerate(trace.experts_LNK):
        router_logits_NE = trace.router_logits_LNE[layer]
        assert np.array_equal(experts_NK, best_experts(router_logits_NE, EXPERTS.top_k))


def test_ties_go_to_the_lower_expert():
    assert best_experts(np.array([[1, 2, 2, 2], [0, 0, 0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]


def test_forced_routes_keep_the_routers_gates():
    config, weights = probe_model("llama", 0, EXPERTS)
    oracle, tokens = NumpyModel(config, weights), tokens_of(config)
    free = oracle(tokens)
    again, other = oracle(tokens, free.experts_LNK), oracle(tokens, free.experts_LNK[..., ::-1])
    assert np.array_equal(free.logits_BTV, again.logits_BTV)
    np.testing.assert_allclose(free.logits_BTV, other.logits_BTV, rtol=0, atol=LIMIT)
    forced = oracle(tokens, (free.experts_LNK + 1) % EXPERTS.n_experts)
    assert np.array_equal(forced.router_logits_LNE[0], free.router_logits_LNE[0])
    assert np.abs(forced.logits_BTV - free.logits_BTV).max() > 1e-3


@pytest.mark.parametrize("name", preset_names("architectures"))
def test_modules_by_themselves_are_those_of_the_whole(name):
    config, weights = probe_model(name, 0, EXPERTS)
    oracle = NumpyModel(config, weights)
    calls = oracle(tokens_of(config)).calls
    assert set(calls) >= {"embed_tokens", "norm", "lm_head", "layers.1.self_attn.o_proj", "layers.0.mlp.experts"}
    for module, call in calls.items():
        assert np.array_equal(oracle.module(module, *call.inputs), call.output), module
