"""A family's config.json as our ModelConfig: every key is honoured, known not to matter here, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.layout import FAMILIES
from mlx_moe.validation import nearest, read_mapping, validate

# Transformers' words for our activations; `gelu_new` and `gelu_pytorch_tanh` are the same function.
ACTIVATIONS = {
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
    "mixtral": "MixtralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}

# What the logits do not depend on: provenance, training, generation, other heads, and how something is computed.
_IRRELEVANT = """
    _name_or_path _model_name_or_path _commit_hash transformers_version transformers.js_config is_llama_config dtype
    torch_dtype finetuning_task task_specific_params problem_type id2label label2id num_labels tokenizer_class prefix
    unsloth_version unsloth_fixed bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    decoder_start_token_id attention_dropout attn_pdrop embd_pdrop resid_pdrop summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj output_router_logits
    router_aux_loss_coef router_jitter_noise gradient_checkpointing use_cache output_attentions output_hidden_states
    return_dict use_return_dict torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward pretraining_tp
    reorder_and_upcast_attn _attn_implementation _attn_implementation_autoset max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())

# What would change the model, with the only values at which it does not.
INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, True),  # all of these families are decoders, whatever it says
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "quantization": (None,),
    "auto_map": (None, {}),
    "model_file": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
WAYS_OUT = {
    "quantization_config": "quantised weights are not read; take the model in float32, bfloat16 or float16",
    "quantization": "quantised weights are not read; take the model in float32, bfloat16 or float16",
    "auto_map": "the model brings code of its own, which is never run",
    "model_file": "the model brings code of its own, which is never run",
}


def read_config(folder: Path) -> tuple[str, ModelConfig]:
    """The family of a model in Hugging Face's folder, and its architecture in our words.

    Raises InputError, which names the key that cannot be honoured, its value, and what could be.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"no config.json in {folder}; name the folder of a model, as Hugging Face's hub has it")
    keys = _Keys(file, read_mapping(file))
    family = keys.one_of("model_type", FAMILIES)
    keys.one_of("architectures", [[CLASSES[family]], None], None)
    fields = _gpt2(keys) if family == "gpt2" else _llama(keys, family)
    keys.refuse_the_rest()
    try:
        return family, validate(ModelConfig, {"architecture": family, **fields})
    except InputError as error:
        raise InputError(f"{file}: {'; '.join(str(error).splitlines())}") from None


_REQUIRED = object()


class _Keys:
    """The keys of a config.json; those that nobody asked for are refused in the end."""

    def __init__(self, file: Path, values: dict[str, Any]):
        self._file = file
        self._left = dict(values)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        if key not in self._left and default is _REQUIRED:
            raise InputError(f"{self._file} has no {key}, which the model cannot do without")
        return self._left.pop(key, default)

    def one_of(self, key: str, supported: Iterable[Any], default: Any = _REQUIRED) -> Any:
        value = self.take(key, default)
        for known in supported:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return value
        self.refuse(key, value, f"supported: {', '.join(map(str, supported))}")

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, value, "it must be a whole number from 1")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.refuse(key, value, "it must be a number above 0")
        return float(value)

    def refuse(self, key: str, value: Any, supported: str) -> Any:
        raise InputError(f"{self._file}: {key} = {value!r} cannot be honoured; {supported}")

    def refuse_the_rest(self) -> None:
        for key, value in self._left.items():
            if key in INERT:
                inert = INERT[key]
                if value not in inert:
                    self.refuse(key, value, WAYS_OUT.get(key) or f"supported: {', '.join(map(str, inert))}")
            elif key not in IRRELEVANT:
                hint = nearest(key, sorted(IRRELEVANT | INERT.keys()), cutoff=0.8)
                self.refuse(
                    key, value, f"{hint}the key is unknown for this model_type; delete it if nothing hangs on it"
                )


def _llama(keys: _Keys, family: str) -> dict[str, Any]:
    """Llama, Mistral and Mixtral. What is left out has transformers' value for the family."""
    d_model, n_heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    n_kv_heads = keys.take("num_key_value_heads", None if family == "llama" else _REQUIRED)
    head_dim = keys.take("head_dim", None)
    context_length = keys.whole("max_position_embeddings")
    fields = {
        "vocab_size": keys.whole("vocab_size"),
        "context_length": context_length,
        "d_model": d_model,
        "n_layers": keys.whole("num_hidden_layers"),
        "n_heads": n_heads,
        "d_ff": keys.whole("intermediate_size"),
        "normalization": "rmsnorm",
        "norm_eps": keys.number("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        "activation": ACTIVATIONS[keys.one_of("hidden_act", ACTIVATIONS, "silu")],
        "ffn_type": "swiglu",
        "rope_theta": _rope_theta(keys, 1e6 if family == "mixtral" else 10_000.0),
        "bias": _bias(keys, family),
        "weight_tying": keys.one_of("tie_word_embeddings", [True, False], False),
        "init_std": keys.number("initializer_range", 0.02),
    }
    fields |= {"n_kv_heads": n_kv_heads} if n_kv_heads is not None else {}
    fields |= {"head_dim": head_dim} if head_dim is not None else {}
    window = keys.take("sliding_window", 4096 if family == "mistral" else None)
    if window is not None and (not isinstance(window, int) or window < context_length):
        keys.refuse(
            "sliding_window", window,
            f"supported: none, or one that sees all of max_position_embeddings; lower that to {window} "
            "to use the model up to there",
        )  # fmt: skip
    layer_types = keys.take("layer_types", None)
    if layer_types not in (None, ["full_attention"] * fields["n_layers"]):
        keys.refuse("layer_types", layer_types, "supported: full_attention in every layer")
    if family == "mixtral":
        experts, top_k = keys.whole("num_local_experts"), keys.whole("num_experts_per_tok")
        fields["moe"] = {"n_experts": experts, "top_k": top_k}
    return fields


def _bias(keys: _Keys, family: str) -> bool:
    """All linear maps have one or none has; Mistral's and Mixtral's never do."""
    attention = keys.one_of("attention_bias", [True, False] if family == "llama" else [False], False)
    mlp = keys.one_of("mlp_bias", [True, False] if family == "llama" else [False], False)
    if attention != mlp:
        keys.refuse("attention_bias", attention, f"supported: the same as mlp_bias, which is {mlp}")
    return bool(attention)


def _rope_theta(keys: _Keys, default: float) -> float:
    """Transformers 5 writes `rope_parameters.rope_theta`; 4 and mlx-lm know `rope_theta` and `rope_scaling`."""
    thetas: dict[str, float] = {}
    if (theta := keys.take("rope_theta", None)) is not None:
        thetas["rope_theta"] = theta
    for key in ("rope_parameters", "rope_scaling"):
        group = keys.take(key, None)
        if group is None:
            continue
        if not isinstance(group, dict):
            keys.refuse(key, group, "it must be a mapping")
        for name, value in group.items():
            if name == "rope_theta":
                thetas[f"{key}.{name}"] = value
            elif (name, value) not in {("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)}:
                keys.refuse(f"{key}.{name}", value, "supported: rope_type default, RoPE without scaling")
    for name, theta in thetas.items():
        if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
            keys.refuse(name, theta, "it must be a number above 0")
        if theta != next(iter(thetas.values())):
            keys.refuse(name, theta, f"{next(iter(thetas))} says {next(iter(thetas.values()))}; make them the same")
    return float(next(iter(thetas.values()), default))


def _gpt2(keys: _Keys) -> dict[str, Any]:
    d_model, context_length = keys.whole("n_embd"), keys.whole("n_positions")
    keys.one_of("n_ctx", [context_length], context_length)
    d_ff = keys.take("n_inner", None)
    return {
        "vocab_size": keys.whole("vocab_size"),
        "context_length": context_length,
        "d_model": d_model,
        "n_layers": keys.whole("n_layer"),
        "n_heads": keys.whole("n_head"),
        "d_ff": 4 * d_model if d_ff is None else d_ff,
        "normalization": "layernorm",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": ACTIVATIONS[keys.one_of("activation_function", ACTIVATIONS, "gelu_new")],
        "ffn_type": "standard",
        "position_encoding": "learned_absolute",
        "bias": True,
        "weight_tying": keys.one_of("tie_word_embeddings", [True, False], True),
        "init_std": keys.number("initializer_range", 0.02),
    }
