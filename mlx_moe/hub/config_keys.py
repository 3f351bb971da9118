"""Reader of config.json's keys: each is requested, known to be irrelevant, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from mlx_moe.errors import InputError, brief_name, quoted
from mlx_moe.hub.foreign import NO_CODE, NO_QUANTIZED
from mlx_moe.validation import nearest

# Keys that do not affect the logits: provenance, training, generation, other heads, and computation.
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

# Keys that would change the model, with the only values at which they do not.
INERT: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, True),  # all of these families are decoders regardless
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "quantization": (None,),
    "auto_map": (None, {}),
    "model_file": (None,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
REMEDIES = {
    **dict.fromkeys(("quantization_config", "quantization"), NO_QUANTIZED),
    **dict.fromkeys(("auto_map", "model_file"), NO_CODE),
}


REQUIRED = object()


class Keys:
    """The keys of a config.json; keys that nobody requested are refused at the end.

    `largest`: upper bound of all sizes, the number of values in the files.
    """

    def __init__(self, file: Path, values: dict[str, Any], largest: int, section: str = ""):
        self._file = file
        self._left = dict(values)
        self._largest = largest
        self._section = section

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        if key not in self._left and default is REQUIRED:
            raise InputError(f"{self._file} has no {self._section}{key}, which is required")
        return self._left.pop(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def is_null(self, key: str) -> bool:
        """Return whether a key is absent or null; a null key is consumed."""
        if self._left.get(key) is not None:
            return False
        self._left.pop(key, None)
        return True

    def one_of(self, key: str, supported: Iterable[Any], default: Any = REQUIRED) -> Any:
        value = self.take(key, default)
        for known in supported:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return value
        self.refuse(key, value, f"supported: {', '.join(map(str, supported))}")

    def integer(self, key: str, default: Any = REQUIRED, largest: int | None = None) -> int:
        """Return an integer from 1 to `largest`, or to the number of values in the files."""
        value = self.take(key, default)
        if not _is_whole(value) or value < 1:
            self.refuse(key, value, "it must be a whole number from 1")
        if value > (self._largest if largest is None else largest):
            self.refuse(
                key, value,
                f"at most {largest:,}" if largest is not None
                else f"the files hold only {self._largest:,} values; it is not that of these weights",
            )  # fmt: skip
        return int(value)

    def integer_or_null(self, key: str, default: Any, largest: int | None = None) -> int | None:
        """Return an integer from 1 to `largest`, or None if the key is null, or absent without another default."""
        if self._left.get(key, default) is None:
            self._left.pop(key, None)
            return None
        return self.integer(key, default, largest)

    def list_of(self, kind: type[Any], key: str, default: Any = REQUIRED) -> list[Any] | None:
        """Return a list of integers or strings; or None if that is the default or the value."""
        value = self.take(key, default)
        if value is None and default is None:
            return None
        is_kind = _is_whole if kind is int else lambda entry: isinstance(entry, kind)
        if not isinstance(value, list) or not all(map(is_kind, value)):
            self.refuse(key, value, f"it must be a list of {'whole numbers' if kind is int else 'strings'}")
        return list(value)

    def number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.refuse(key, value, "it must be a number above 0")
        return float(value)

    def section(self, key: str) -> Keys | None:
        """Return the keys of a mapping under a key; None if there is none."""
        values = self.take(key, None)
        if values is not None and not isinstance(values, dict):
            self.refuse(key, values, "it must be a mapping")
        return None if values is None else Keys(self._file, values, self._largest, f"{key}.")

    def refuse(self, key: str, value: Any, supported: str) -> NoReturn:
        place = brief_name(f"{self._section}{key}")
        raise InputError(f"{self._file}: {place} = {quoted(value)} cannot be honoured; {supported}")

    def refuse_the_rest(self) -> None:
        for key, value in self._left.items():
            if key in INERT:
                inert = INERT[key]
                if value not in inert:
                    self.refuse(key, value, REMEDIES.get(key) or f"supported: {', '.join(map(str, inert))}")
            elif key not in IRRELEVANT:
                hint = nearest(key, sorted(IRRELEVANT | INERT.keys()), cutoff=0.8)
                self.refuse(
                    key, value, f"{hint}the key is unknown for this model_type; delete it if nothing depends on it"
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
