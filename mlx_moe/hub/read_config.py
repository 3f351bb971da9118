"""Conversion of a family's config.json to ModelConfig: every key is honoured, known to be irrelevant, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.config_keys import REQUIRED, Keys
from mlx_moe.hub.foreign import CONFIG, read_settings
from mlx_moe.hub.layout import FAMILIES, OWN_TENSOR_EACH
from mlx_moe.hub.rope_keys import read_rope
from mlx_moe.hub.sizes import check_config_fits_files
from mlx_moe.storage.tensor_files import StoredTensor, n_elements
from mlx_moe.validation import validate

# Transformers' names of our activations; `gelu_new` and `gelu_pytorch_tanh` are the same function.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "leaky_relu": "leaky_relu",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
GRANITES = ("granitemoe", "granitemoehybrid")
LONGEST_CONTEXT = 1 << 30  # tokens: no tensor limits RoPE's context; the longest published is 10 million
SWITCHED_WINDOWS = {"qwen2", "qwen3", "qwen3_moe"}  # families whose sliding window applies only with use_sliding_window


def read_config(folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[str, ModelConfig]:
    """Return the family of a model in Hugging Face's format, and its ModelConfig.

    Sizes are checked against the tensors in its files. Raises InputError naming a key that cannot be honoured, its
    value, and the supported values.
    """
    file = folder / CONFIG
    keys = Keys(file, read_settings(folder), n_elements(tensors))
    family = keys.one_of("model_type", FAMILIES)
    keys.one_of("architectures", [[CLASSES[family]], None], None)
    fields = _gpt2(keys, len(tensors)) if family == "gpt2" else _llama(keys, family, len(tensors))
    keys.refuse_the_rest()
    try:
        config = validate(ModelConfig, {"architecture": family, **fields})
    except InputError as error:
        raise InputError(f"{file}: {'; '.join(error.lines)}") from None
    check_config_fits_files(file, config, tensors, family in OWN_TENSOR_EACH)
    return family, config


def _llama(keys: Keys, family: str, most_layers: int) -> dict[str, Any]:
    """Convert Llama and its relatives. Omitted keys have transformers' defaults for the family."""
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    n_kv_heads = keys.integer_or_null("num_key_value_heads", None if family in ("llama", *GRANITES) else REQUIRED)
    head_dim = keys.integer_or_null("head_dim", 128 if family == "qwen3" else None)
    fields = {
        "vocab_size": keys.integer("vocab_size"),
        "context_length": keys.integer("max_position_embeddings", largest=LONGEST_CONTEXT),
        "d_model": d_model,
        "n_layers": keys.integer("num_hidden_layers", largest=most_layers),
        "n_heads": n_heads,
        "normalization": "rmsnorm",
        "norm_eps": keys.number("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "activation": ACTIVATION_NAMES[keys.one_of("hidden_act", ACTIVATION_NAMES, "silu")],
        "ffn_type": "swiglu",
        "weight_tying": keys.one_of("tie_word_embeddings", [True, False], False),
        "init_std": keys.number("initializer_range", 0.02),
    }
    fields |= read_rope(keys, 1e6 if family == "mixtral" else 10_000.0)
    fields |= {"n_kv_heads": n_kv_heads} if n_kv_heads is not None else {}
    fields |= {"head_dim": head_dim} if head_dim is not None else {}
    if family == "granitemoehybrid":
        _refuse_mamba(keys, fields["n_layers"])
    _refuse_windows(keys, family, fields["context_length"], fields["n_layers"])
    if family in GRANITES:
        _refuse_multipliers(keys, max(1, d_model // n_heads))
    return fields | _biases(keys, family) | _feed_forward(keys, family, fields["n_layers"])


def _biases(keys: Keys, family: str) -> dict[str, Any]:
    if family == "qwen2":
        return {"bias": False, "attention_bias": "qkv"}
    free = [True, False]
    attention = keys.one_of("attention_bias", [False] if family in ("mistral", "mixtral") else free, False)
    mlp = keys.one_of("mlp_bias", free if family == "llama" else [False], False)
    return {"bias": mlp, "attention_bias": "qkvo" if attention else "none"}


def _feed_forward(keys: Keys, family: str, n_layers: int) -> dict[str, Any]:
    if family == "qwen3_moe":
        return _qwen3_experts(keys, n_layers)
    d_ff = keys.integer("intermediate_size")
    if family not in ("mixtral", *GRANITES):
        return {"d_ff": d_ff}
    moe = {"n_experts": keys.integer("num_local_experts"), "top_k": keys.integer("num_experts_per_tok")}
    if family == "granitemoehybrid":
        moe |= {"shared_d_ff": keys.integer("shared_intermediate_size")}
    return {"d_ff": d_ff, "moe": moe}


def _qwen3_experts(keys: Keys, n_layers: int) -> dict[str, Any]:
    """Convert Qwen3's experts: every n-th layer (`decoder_sparse_step`), except `mlp_only_layers`."""
    keys.one_of("norm_topk_prob", [True], False)  # gates sum to 1
    step, dense = keys.integer("decoder_sparse_step", 1), set(keys.list_of(int, "mlp_only_layers", None) or [])
    layers = [layer for layer in range(n_layers) if (layer + 1) % step == 0 and layer not in dense]
    if not layers:
        keys.refuse(
            "mlp_only_layers", sorted(dense), f"of {n_layers} layers, every {step}th of them, none is left with experts"
        )
    n_experts = keys.integer("num_experts" if "num_experts" in keys else "num_local_experts")
    keys.one_of("num_local_experts", [n_experts], n_experts)
    d_ff, d_ff_dense = keys.integer("moe_intermediate_size"), keys.integer_or_null("intermediate_size", None)
    moe = {"n_experts": n_experts, "top_k": keys.integer("num_experts_per_tok")}
    if len(layers) == n_layers:
        return {"d_ff": d_ff, "moe": moe}
    return {"d_ff": d_ff_dense, "moe": moe | {"layers": layers, "d_ff": d_ff if d_ff != d_ff_dense else None}}


def _refuse_windows(keys: Keys, family: str, context_length: int, n_layers: int) -> None:
    """Refuse an attention window shorter than the context; a window that covers it changes nothing."""
    window = keys.integer_or_null("sliding_window", 4096 if family == "mistral" else None, LONGEST_CONTEXT)
    layer_types = keys.list_of(str, "layer_types", None)
    slides = window is not None
    if family in SWITCHED_WINDOWS:
        slides = keys.one_of("use_sliding_window", [True, False], False) and slides
    if family in ("qwen2", "qwen3"):
        first_to_slide = keys.integer_or_null("max_window_layers", 28, LONGEST_CONTEXT)
        if layer_types is None and first_to_slide is not None and first_to_slide >= n_layers:
            slides = False
    if layer_types is not None:
        kinds = ("full_attention", "sliding_attention") if slides else ("full_attention",)
        if len(layer_types) != n_layers or any(kind not in kinds for kind in layer_types):
            keys.refuse("layer_types", layer_types, f"supported: {' or '.join(kinds)} in each of {n_layers} layers")
        slides = "sliding_attention" in layer_types
    if slides and (window is None or window < context_length):
        keys.refuse(
            "sliding_window", window,
            f"supported: none, or one that sees all of max_position_embeddings; lower that to {window} "
            "to use the model up to there",
        )  # fmt: skip


def _refuse_mamba(keys: Keys, n_layers: int) -> None:
    kinds, supported = keys.list_of(str, "layer_types") or [], ("attention", "full_attention")
    if len(kinds) != n_layers or any(kind not in supported for kind in kinds):
        keys.refuse("layer_types", kinds, f"supported: {' or '.join(supported)} in each of {n_layers} layers")
    keys.one_of("position_embedding_type", ["rope"], None)
    for name in (
        "n_heads",
        "n_groups",
        "d_state",
        "d_head",
        "d_conv",
        "expand",
        "chunk_size",
        "conv_bias",
        "proj_bias",
    ):
        keys.take(f"mamba_{name}", None)
    keys.take("time_step_limit", None)


def _refuse_multipliers(keys: Keys, head_dim: int) -> None:
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        keys.one_of(name, [1], 1)
    keys.one_of("attention_multiplier", [head_dim**-0.5], 1)


def _gpt2(keys: Keys, most_layers: int) -> dict[str, Any]:
    d_model, context_length = keys.integer("n_embd"), keys.integer("n_positions")
    keys.one_of("n_ctx", [context_length], context_length)
    d_ff = keys.integer_or_null("n_inner", None)
    return {
        "vocab_size": keys.integer("vocab_size"),
        "context_length": context_length,
        "d_model": d_model,
        "n_layers": keys.integer("n_layer", largest=most_layers),
        "n_heads": keys.integer("n_head"),
        "d_ff": 4 * d_model if d_ff is None else d_ff,
        "normalization": "layernorm",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": ACTIVATION_NAMES[keys.one_of("activation_function", ACTIVATION_NAMES, "gelu_new")],
        "ffn_type": "standard",
        "position_encoding": "learned_absolute",
        "bias": True,
        "weight_tying": keys.one_of("tie_word_embeddings", [True, False], True),
        "init_std": keys.number("initializer_range", 0.02),
    }
