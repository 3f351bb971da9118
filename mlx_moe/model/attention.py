"""Causal self-attention with grouped queries and a key-value cache.

B batch, T time (S: with what the cache holds), D model, H query heads, G key-value heads, d head.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_moe.config import ModelConfig
from mlx_moe.model.functional import causal_attention, compute_in_float32_on_cpu, repeat_heads, rotate, softmax
from mlx_moe.model.layers import Linear
from mlx_moe.model.mask import causal_mask
from mlx_moe.rotations import rotation_frequencies

CACHE_BLOCK = 256  # tokens by which a cache grows
Frequencies = tuple[float, ...]  # radians per position of every pair of a head's coordinates


class KVCache:
    """The keys and values of one layer so far; `length` tokens.

    They lie in buffers that grow by CACHE_BLOCK tokens, up to `max_length`, so a new token is written in place.
    """

    def __init__(self, max_length: int) -> None:
        self.length = 0
        self._max_length = max_length
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def extend(self, keys_BGTd: mx.array, values_BGTd: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens. Returns the keys and values of all tokens so far, (B, G, S, d) each."""
        start, end = self.length, self.length + keys_BGTd.shape[2]
        self._keys = self._with_room(self._keys, keys_BGTd, end)
        self._values = self._with_room(self._values, values_BGTd, end)
        self._keys[:, :, start:end], self._values[:, :, start:end] = keys_BGTd, values_BGTd
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _with_room(self, buffer_BGCd: mx.array | None, new_BGTd: mx.array, length: int) -> mx.array:
        """Return the buffer, or a larger copy if it holds fewer than `length` tokens. C capacity."""
        if buffer_BGCd is not None and length <= buffer_BGCd.shape[2]:
            return buffer_BGCd
        batch, heads, _, width = new_BGTd.shape
        capacity = max(length, min(-(-length // CACHE_BLOCK) * CACHE_BLOCK, self._max_length))
        larger_BGCd = mx.zeros((batch, heads, capacity, width), new_BGTd.dtype)
        if buffer_BGCd is not None:
            larger_BGCd[:, :, : self.length] = buffer_BGCd[:, :, : self.length]
        return larger_BGCd


def rope(x_BHTd: mx.array, offset: int, frequencies_h: Frequencies) -> mx.array:
    """Rotate by position (Su et al. 2021), the halves of a head paired as in Llama."""
    return rotate(x_BHTd, offset, frequencies_h)


def no_rotation(x_BHTd: mx.array, offset: int, frequencies_h: Frequencies) -> mx.array:
    return x_BHTd


POSITION_ENCODINGS: dict[str, Callable[[mx.array, int, Frequencies], mx.array]] = {
    "learned_absolute": no_rotation,  # added to the embeddings
    "rope": rope,
    "none": no_rotation,
}


def sdpa_attention(q_BHTd: mx.array, k_BGSd: mx.array, v_BGSd: mx.array) -> mx.array:
    return causal_attention(q_BHTd, k_BGSd, v_BGSd)


@compute_in_float32_on_cpu
def manual_attention(q_BHTd: mx.array, k_BGSd: mx.array, v_BGSd: mx.array) -> mx.array:
    """Return softmax(QKᵀ/√d)V as textbooks write it; query t sees the keys up to S − T + t."""
    k_BHSd, v_BHSd = repeat_heads(q_BHTd, k_BGSd, v_BGSd)
    scores_BHTS = (q_BHTd * q_BHTd.shape[-1] ** -0.5) @ k_BHSd.swapaxes(-1, -2)
    mask_TS = causal_mask(scores_BHTS.shape[-2], scores_BHTS.shape[-1], scores_BHTS.dtype)
    return softmax(scores_BHTS + mask_TS) @ v_BHSd


ATTENTION_BACKENDS: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "sdpa": sdpa_attention,
    "manual": manual_attention,
}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        qkv_bias, o_bias = config.attention_bias != "none", config.attention_bias == "qkvo"
        self.q_proj = Linear(config.d_model, q_width, qkv_bias, config.adapter("q_proj"))
        self.k_proj = Linear(config.d_model, kv_width, qkv_bias, config.adapter("k_proj"))
        self.v_proj = Linear(config.d_model, kv_width, qkv_bias, config.adapter("v_proj"))
        self.o_proj = Linear(q_width, config.d_model, o_bias, config.adapter("o_proj"))
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self._head_dim = config.head_dim
        self._frequencies_h = tuple(rotation_frequencies(config).tolist())
        self._rotate = POSITION_ENCODINGS[config.position_encoding]
        self._attend = ATTENTION_BACKENDS[config.attention_backend]

    def __call__(self, x_BTD: mx.array, cache: KVCache | None = None) -> mx.array:
        offset = cache.length if cache else 0
        q_BHTd, k_BGSd = self._split_heads(self.q_proj(x_BTD)), self._split_heads(self.k_proj(x_BTD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTd, k_BGSd = _normalized(self.q_norm, q_BHTd), _normalized(self.k_norm, k_BGSd)
        q_BHTd = self._rotate(q_BHTd, offset, self._frequencies_h)
        k_BGSd = self._rotate(k_BGSd, offset, self._frequencies_h)
        v_BGSd = self._split_heads(self.v_proj(x_BTD))
        if cache:
            k_BGSd, v_BGSd = cache.extend(k_BGSd, v_BGSd)
        out_BHTd = self._attend(q_BHTd, k_BGSd, v_BGSd)
        return self.o_proj(out_BHTd.swapaxes(1, 2).flatten(2))

    def _split_heads(self, x_BTC: mx.array) -> mx.array:
        return mx.unflatten(x_BTC, -1, (-1, self._head_dim)).swapaxes(1, 2)


def _normalized(norm: nn.RMSNorm, x_BHTd: mx.array) -> mx.array:
    """Normalise in float32, like every norm."""
    normed_BHTd: mx.array = norm(x_BHTd.astype(mx.float32))
    return normed_BHTd.astype(x_BHTd.dtype)
