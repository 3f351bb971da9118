"""Attention on CPU, a block of queries at a time with the keys that it sees.

Scores that the causal mask hides, half of them in a long text, are not computed, and those of a block stay in the
processor's cache while the softmax passes over them. The gradient is written out: by MLX's own, each block would hand
back gradients as long as all keys.

B batch, T time (S: with what the cache holds), H heads, d head, C queries of a block, K keys that they see.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_moe.accounting.memory import MLX_QUERIES
from mlx_moe.model.elementwise import row_sums, softmax, with_vjp


class _Block(NamedTuple):
    """Queries from `start` to `end`, of which the last sees all of the first `n_keys` keys."""

    start: int
    end: int
    n_keys: int


def blocked_attention(q_BHTd: mx.array, k_BHSd: mx.array, v_BHSd: mx.array) -> mx.array:
    """softmax(QKᵀ/√d)V, (B, H, T, d); a query at T sees the keys up to S − T plus its own place."""
    scaled_BHTd = q_BHTd * q_BHTd.shape[-1] ** -0.5
    out_BTHd, *_ = _attention(*map(mx.contiguous, (scaled_BHTd, k_BHSd, v_BHSd)))  # once, not for each block
    return out_BTHd.swapaxes(1, 2)


def causal_mask(n_queries: int, n_keys: int, dtype: mx.Dtype) -> mx.array:
    """What to add to scores, (T, S): the dtype's least number at keys that come after a query, else 0.

    The last query is the last key's.
    """
    comes_after_TS = mx.arange(n_keys) > mx.arange(n_keys - n_queries, n_keys)[:, None]
    return mx.where(comes_after_TS, mx.finfo(dtype).min, 0).astype(dtype)


def _blocks(n_queries: int, n_keys: int) -> list[_Block]:
    ends = [*range(MLX_QUERIES, n_queries, MLX_QUERIES), n_queries]
    return [_Block(start, end, n_keys - n_queries + end) for start, end in zip([0, *ends], ends, strict=False)]


def _forward(q_BHTd: mx.array, k_BHSd: mx.array, v_BHSd: mx.array) -> tuple[mx.array, ...]:
    """The output (B, T, H, d), and the probabilities (B, H, C, K) of each block."""
    outputs, probabilities = [], []
    for start, end, n_keys in _blocks(q_BHTd.shape[2], k_BHSd.shape[2]):
        scores_BHCK = q_BHTd[:, :, start:end] @ k_BHSd[:, :, :n_keys].swapaxes(-1, -2)
        p_BHCK = softmax(scores_BHCK + causal_mask(end - start, n_keys, scores_BHCK.dtype))
        outputs.append((p_BHCK @ v_BHSd[:, :, :n_keys]).swapaxes(1, 2))
        probabilities.append(p_BHCK)
    return mx.concatenate(outputs, axis=1), *probabilities


def _backward(
    primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    q_BHTd, k_BHSd, v_BHSd = primals
    out_BTHd, *probabilities = outputs
    by_out_BHTd = mx.contiguous(cotangents[0].swapaxes(1, 2))
    # Σ_K p·∂p is the output times its gradient (Dao et al. 2022), which is shorter than a row of scores.
    mean_BHT1 = row_sums(cotangents[0] * out_BTHd).swapaxes(1, 2)
    by_q: list[mx.array] = []
    by_k: list[mx.array] = []
    by_v: list[mx.array] = []
    blocks = _blocks(q_BHTd.shape[2], k_BHSd.shape[2])
    for (start, end, n_keys), p_BHCK in reversed(list(zip(blocks, probabilities, strict=True))):
        by_out_BHCd = by_out_BHTd[:, :, start:end]
        by_p_BHCK = by_out_BHCd @ v_BHSd[:, :, :n_keys].swapaxes(-1, -2)
        by_scores_BHCK = p_BHCK * (by_p_BHCK - mean_BHT1[:, :, start:end])
        by_q.append(by_scores_BHCK @ k_BHSd[:, :, :n_keys])
        _add(by_k, by_scores_BHCK.swapaxes(-1, -2) @ q_BHTd[:, :, start:end])
        _add(by_v, p_BHCK.swapaxes(-1, -2) @ by_out_BHCd)
    by_q_BHTd, by_k_BHSd, by_v_BHSd = (mx.concatenate(parts[::-1], axis=2) for parts in (by_q, by_k, by_v))
    return by_q_BHTd, by_k_BHSd, by_v_BHSd


def _add(parts: list[mx.array], first_keys: mx.array) -> None:
    """To gradients of all keys, last part first, those of another block, of the first keys only."""
    if parts:
        n_keys, last = first_keys.shape[2], parts.pop()
        parts.append(last[:, :, n_keys:])
        first_keys = first_keys + last[:, :, :n_keys]
    parts.append(first_keys)


_attention = with_vjp(_forward, _backward)
