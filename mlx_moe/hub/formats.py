"""Capabilities of the export formats, as transformers and mlx-lm both read them, and their config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.read_config import CLASSES, GRANITES, SWITCHED_WINDOWS
from mlx_moe.hub.rope_keys import write_rope

FORMATS = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granitemoe", "granitemoehybrid", "gpt2")


def choose_format(config: ModelConfig, requested: str) -> str:
    """Return the requested format, or for `auto` and `mlx` one that can hold the model; mlx-lm opens all of them.

    Raises InputError with the unsupported, and with the format that can hold it or comes closest.
    """
    if requested not in ("auto", "mlx", *FORMATS):
        raise InputError(f"--format {requested}: must be one of auto, mlx, {', '.join(FORMATS)}")
    requested = "auto" if requested == "mlx" else requested
    lacking = {name: unsupported(config, name) for name in FORMATS}
    fitting = [name for name in FORMATS if not lacking[name]]
    if requested == "auto" and fitting:
        return fitting[0]
    if requested != "auto" and not lacking[requested]:
        return requested
    of_its_kind = [name for name in FORMATS if (name in LLAMAS and LLAMAS[name].experts) == (config.moe is not None)]
    nearest = min(of_its_kind, key=lambda name: len(lacking[name]))
    if fitting:
        remedy = f"take --format {fitting[0]}"
    elif nearest == requested:
        remedy = "no other format comes closer"
    else:
        remedy = f"closest is {nearest}, which cannot hold {', '.join(lacking[nearest])}"
    if not fitting:
        remedy += "; models trained with --preset llama or smollm can be exported"
    missing = "the model" if requested == "auto" else ", ".join(lacking[requested])
    raise InputError(f"--format {requested} cannot hold {missing}; {remedy}")


def unsupported(config: ModelConfig, name: str) -> list[str]:
    """Return the features of a model that a format cannot hold."""
    checks = _gpt2_checks(config) if name == "gpt2" else _llama_checks(config, name)
    return [reason for holds, reason in checks if not holds]


def normalize_for_format(config: ModelConfig, name: str) -> ModelConfig:
    """Return the config with a format's conventions.

    Granite's attention has all biases or none, so o_proj's become zeros. If every layer has experts, the only FFN width
    is theirs.
    """
    if name in GRANITES and config.attention_bias == "qkv":
        config = config.model_copy(update={"attention_bias": "qkvo"})
    if config.moe is None:
        return config
    everywhere, width = len(config.expert_layers) == config.n_layers, config.expert_d_ff
    if everywhere:
        moe = config.moe.model_copy(update={"d_ff": None, "layers": None})
        return config.model_copy(update={"d_ff": width, "moe": moe})
    moe = config.moe.model_copy(update={"d_ff": None if width == config.d_ff else width})
    return config.model_copy(update={"moe": moe})


@dataclass(frozen=True)
class _Format:
    """Capabilities of a relative of Llama; if transformers supports more, mlx-lm does not."""

    experts: bool
    qk_norm: bool
    attention_bias: tuple[str, ...]
    bias: tuple[bool, ...] = (False,)
    any_head_dim: bool = False
    rope_scaling: bool = True
    dense_layers: bool = False  # dense layers beside those with experts
    shared_expert: bool = False


LLAMAS = {
    "llama": _Format(False, False, ("none", "qkvo"), (False, True), any_head_dim=True),
    "qwen2": _Format(False, False, ("qkv",)),
    "qwen3": _Format(False, True, ("none",), any_head_dim=True),
    "mixtral": _Format(True, False, ("none",), rope_scaling=False),
    "qwen3_moe": _Format(True, True, ("none",), any_head_dim=True, rope_scaling=False, dense_layers=True),
    "granitemoe": _Format(True, False, ("none", "qkv", "qkvo")),
    "granitemoehybrid": _Format(True, False, ("none", "qkv", "qkvo"), rope_scaling=False, shared_expert=True),
}


def _llama_checks(config: ModelConfig, name: str) -> list[tuple[bool, str]]:
    form, head_dim = LLAMAS[name], config.d_model // config.n_heads
    n_mixtures, has_shared = len(config.expert_layers), config.moe is not None and config.moe.shared_d_ff > 0
    return [
        (config.normalization == "rmsnorm", f"normalization {config.normalization} (only rmsnorm)"),
        (config.norm_position == "pre", "norm_position post (only pre)"),
        (config.ffn_type == "swiglu", f"ffn_type {config.ffn_type} (only swiglu)"),
        (config.activation == "silu", f"activation {config.activation} (mlx-lm: only silu)"),
        (config.position_encoding == "rope", f"position_encoding {config.position_encoding} (only rope)"),
        ((config.moe is not None) == form.experts, "a model without experts" if form.experts else "experts"),
        (form.dense_layers or n_mixtures in (0, config.n_layers), "dense layers beside those with experts"),
        (not has_shared or form.shared_expert, "a shared expert"),
        (has_shared or not form.shared_expert or not config.moe, "a model without a shared expert"),
        (config.qk_norm == form.qk_norm, "a model without qk_norm" if form.qk_norm else "qk_norm"),
        (config.bias in form.bias, "biases"),
        (
            config.attention_bias in form.attention_bias,
            f"attention_bias {config.attention_bias} (only {', '.join(form.attention_bias)})",
        ),
        (config.rope_scaling is None or form.rope_scaling, "rope_scaling (mlx-lm)"),
        (
            config.head_dim == head_dim or form.any_head_dim,
            f"head_dim {config.head_dim} (mlx-lm: only d_model / n_heads = {head_dim})",
        ),
        (
            config.d_model % config.n_heads == 0 or (form.any_head_dim and name != "llama"),
            f"n_heads {config.n_heads}, which do not divide d_model",
        ),
    ]


def _gpt2_checks(config: ModelConfig) -> list[tuple[bool, str]]:
    d_model = config.d_model
    return [
        (config.normalization == "layernorm", f"normalization {config.normalization} (only layernorm)"),
        (config.norm_position == "pre", "norm_position post (only pre)"),
        (config.ffn_type == "standard", f"ffn_type {config.ffn_type} (only standard)"),
        (config.activation == "gelu_tanh", f"activation {config.activation} (mlx-lm: only gelu_tanh)"),
        (
            config.position_encoding == "learned_absolute",
            f"position_encoding {config.position_encoding} (only learned_absolute)",
        ),
        (config.bias, "bias false (only true)"),
        (config.attention_bias == "qkvo", f"attention_bias {config.attention_bias} (only qkvo)"),
        (not config.qk_norm, "qk_norm"),
        (config.weight_tying, "weight_tying false (mlx-lm: only true)"),
        (config.n_kv_heads == config.n_heads, f"n_kv_heads {config.n_kv_heads} (only n_heads)"),
        (config.n_heads * config.head_dim == d_model, f"head_dim {config.head_dim} (only d_model / n_heads)"),
        (config.d_ff == 4 * d_model, f"d_ff {config.d_ff} (mlx-lm: only 4 · d_model = {4 * d_model})"),
        (config.moe is None, "experts"),
    ]


def to_json(config: ModelConfig, name: str, special_tokens: dict[str, int | None]) -> dict[str, Any]:
    """Return config.json with both spellings of RoPE's keys: mlx-lm reads one, transformers writes the other."""
    values = {
        "architectures": [CLASSES[name]],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.weight_tying,
        "initializer_range": config.init_std,
        "torch_dtype": "float32",
        "use_cache": True,
    } | special_tokens
    if name == "gpt2":
        return values | {
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.d_ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }
    values |= {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "attention_dropout": 0.0,
    }
    if name in ("llama", "qwen3", "mixtral", "qwen3_moe"):
        values |= {"head_dim": config.head_dim}
    if name == "llama":
        values |= {"mlp_bias": config.bias}
    if name in ("llama", "qwen3", "qwen3_moe", *GRANITES):
        values |= {"attention_bias": config.attention_bias != "none"}
    if name in SWITCHED_WINDOWS:
        values |= {"use_sliding_window": False}
    if name == "mixtral":
        values |= {"sliding_window": None}
    if config.moe is None:
        return values
    values |= {"num_experts_per_tok": config.moe.top_k}
    if name == "qwen3_moe":
        return values | {
            "num_experts": config.moe.n_experts,
            "moe_intermediate_size": config.expert_d_ff,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.n_layers) if layer not in config.expert_layers],
            "norm_topk_prob": True,
        }
    values |= {"num_local_experts": config.moe.n_experts}
    if name == "granitemoehybrid":
        values |= {
            "shared_intermediate_size": config.moe.shared_d_ff,
            "layer_types": ["attention"] * config.n_layers,
            "position_embedding_type": "rope",
            "mamba_n_heads": 1,  # unused; transformers requires that they divide twice the width
        }
    if name in GRANITES:
        values |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
        values |= {"attention_multiplier": config.head_dim**-0.5}
    return values
