"""Causal self-attention with grouped queries and a key-value cache.

B batch, T time (S: with what the cache holds), D model, H query heads, G key-value heads, d head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_moe.config import ModelConfig
from mlx_moe.rotations import rotation_frequencies
from torch_ref.layers import Linear

CACHE_BLOCK = 256  # tokens by which a cache grows
Frequencies = tuple[float, ...]  # radians per position of every pair of a head's coordinates


class KVCache:
    """The keys and values of one layer so far; `length` tokens.

    They lie in buffers that grow by CACHE_BLOCK tokens, up to `max_length`, so a new token is written in place.
    """

    def __init__(self, max_length: int) -> None:
        self.length = 0
        self._max_length = max_length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys_BGTd: Tensor, values_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens. Returns the keys and values of all tokens so far, (B, G, S, d) each."""
        start, end = self.length, self.length + keys_BGTd.shape[2]
        self._keys = self._with_room(self._keys, keys_BGTd, end)
        self._values = self._with_room(self._values, values_BGTd, end)
        self._keys[:, :, start:end], self._values[:, :, start:end] = keys_BGTd, values_BGTd
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _with_room(self, buffer_BGCd: Tensor | None, new_BGTd: Tensor, length: int) -> Tensor:
        """Return the buffer, or a larger copy if it holds fewer than `length` tokens. C capacity."""
        if buffer_BGCd is not None and length <= buffer_BGCd.shape[2]:
            return buffer_BGCd
        batch, heads, _, width = new_BGTd.shape
        capacity = max(length, min(-(-length // CACHE_BLOCK) * CACHE_BLOCK, self._max_length))
        larger_BGCd = new_BGTd.new_zeros(batch, heads, capacity, width)
        if buffer_BGCd is not None:
            larger_BGCd[:, :, : self.length] = buffer_BGCd[:, :, : self.length]
        return larger_BGCd


def rope(x_BHTd: Tensor, offset: int, frequencies_h: Frequencies) -> Tensor:
    """Rotary positions (Su et al. 2021), the halves of a head paired as in Llama."""
    cos_Th, sin_Th = rotations(offset, x_BHTd.shape[-2], frequencies_h, x_BHTd.device)
    first_BHTh, second_BHTh = x_BHTd.float().chunk(2, dim=-1)
    rotated = (first_BHTh * cos_Th - second_BHTh * sin_Th, second_BHTh * cos_Th + first_BHTh * sin_Th)
    return torch.cat(rotated, dim=-1).to(x_BHTd.dtype)


def rotations(offset: int, n_tokens: int, frequencies_h: Frequencies, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, h) float32 each; graphs of torch.compile hold them as constants."""
    return _rotation_table(offset, n_tokens, frequencies_h, device)


@lru_cache(maxsize=8)
def _rotation_table(
    offset: int, n_tokens: int, frequencies_h: Frequencies, device: torch.device
) -> tuple[Tensor, Tensor]:
    positions_T = torch.arange(offset, offset + n_tokens, device=device, dtype=torch.float64)
    angles_Th = positions_T[:, None] * torch.tensor(frequencies_h, device=device, dtype=torch.float64)
    return angles_Th.cos().float(), angles_Th.sin().float()


def no_rotation(x_BHTd: Tensor, offset: int, frequencies_h: Frequencies) -> Tensor:
    return x_BHTd


POSITION_ENCODINGS: dict[str, Callable[[Tensor, int, Frequencies], Tensor]] = {
    "learned_absolute": no_rotation,  # added to the embeddings
    "rope": rope,
    "none": no_rotation,
}


def sdpa_attention(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
    n_queries, n_keys = q_BHTd.shape[2], k_BGSd.shape[2]
    grouped = q_BHTd.shape[1] != k_BGSd.shape[1]
    if n_queries in (1, n_keys):
        return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, is_causal=n_queries > 1, enable_gqa=grouped)
    mask_TS = _visible(n_queries, n_keys, q_BHTd.device)  # PyTorch's is_causal counts from the first key
    return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, attn_mask=mask_TS, enable_gqa=grouped)


def manual_attention(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
    """Return softmax(QKᵀ/√d)V as textbooks write it; query t sees the keys up to S − T + t."""
    group = q_BHTd.shape[1] // k_BGSd.shape[1]
    k_BHSd, v_BHSd = k_BGSd.repeat_interleave(group, dim=1), v_BGSd.repeat_interleave(group, dim=1)
    scores_BHTS = (q_BHTd * q_BHTd.shape[-1] ** -0.5) @ k_BHSd.transpose(-1, -2)
    visible_TS = _visible(q_BHTd.shape[2], k_BGSd.shape[2], scores_BHTS.device)
    scores_BHTS = scores_BHTS.masked_fill(~visible_TS, torch.finfo(scores_BHTS.dtype).min)
    return scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BHSd.dtype) @ v_BHSd


def _visible(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    queries_T = torch.arange(n_keys - n_queries, n_keys, device=device)
    return torch.arange(n_keys, device=device) <= queries_T[:, None]


ATTENTION_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
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

    def forward(self, x_BTD: Tensor, cache: KVCache | None = None) -> Tensor:
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
        return self.o_proj(out_BHTd.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)


def _normalized(norm: nn.RMSNorm, x_BHTd: Tensor) -> Tensor:
    """Normalise in float32, like every norm."""
    normed_BHTd: Tensor = norm(x_BHTd.float())
    return normed_BHTd.to(x_BHTd.dtype)
