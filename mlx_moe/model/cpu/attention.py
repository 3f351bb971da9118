"""Attention of a block of queries at a time, with the keys that it sees.

The scores that the causal mask hides are not computed: half of them in a long text. A block's scores stay in the
processor's cache while the softmax passes over them. The gradient is written out, since MLX's own would return
gradients of all keys from each block.

B batch, T time (S: with what the cache holds), H heads, d head, C queries of a block, K keys that they see.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_moe.kernel_sizes import MLX_QUERIES
from mlx_moe.model.cpu.elementwise import row_sums, softmax, with_vjp
from mlx_moe.model.mask import causal_mask


class _Block(NamedTuple):
    """Queries from `start` to `end`, of which the last sees all of the first `n_keys` keys."""

    start: int
    end: int
    n_keys: int


def blocked_attention(q_BHTd: mx.array, k_BHSd: mx.array, v_BHSd: mx.array) -> mx.array:
    """Return softmax(QKᵀ/√d)V, (B, H, T, d); query t sees the keys up to S − T + t."""
    scaled_BHTd = q_BHTd * q_BHTd.shape[-1] ** -0.5
    out_BTHd, *_ = _attention(*map(mx.contiguous, (scaled_BHTd, k_BHSd, v_BHSd)))  # once, not for each block
    return out_BTHd.swapaxes(1, 2)


def _blocks(n_queries: int, n_keys: int) -> list[_Block]:
    ends = [*range(MLX_QUERIES, n_queries, MLX_QUERIES), n_queries]
    return [_Block(start, end, n_keys - n_queries + end) for start, end in zip([0, *ends], ends, strict=False)]


def _forward(q_BHTd: mx.array, k_BHSd: mx.array, v_BHSd: mx.array) -> tuple[mx.array, ...]:
    """Return the output (B, T, H, d), and the probabilities (B, H, C, K) of each block."""
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
    grad_out_BHTd = mx.contiguous(cotangents[0].swapaxes(1, 2))
    # Σ_K p·∂p is the output times its gradient (Dao et al. 2022), which is shorter than a row of scores.
    mean_BHT1 = row_sums(cotangents[0] * out_BTHd).swapaxes(1, 2)
    grad_q: list[mx.array] = []
    grad_k: list[mx.array] = []
    grad_v: list[mx.array] = []
    blocks = _blocks(q_BHTd.shape[2], k_BHSd.shape[2])
    for (start, end, n_keys), p_BHCK in reversed(list(zip(blocks, probabilities, strict=True))):
        grad_out_BHCd = grad_out_BHTd[:, :, start:end]
        grad_p_BHCK = grad_out_BHCd @ v_BHSd[:, :, :n_keys].swapaxes(-1, -2)
        grad_scores_BHCK = p_BHCK * (grad_p_BHCK - mean_BHT1[:, :, start:end])
        grad_q.append(grad_scores_BHCK @ k_BHSd[:, :, :n_keys])
        _accumulate(grad_k, grad_scores_BHCK.swapaxes(-1, -2) @ q_BHTd[:, :, start:end])
        _accumulate(grad_v, p_BHCK.swapaxes(-1, -2) @ grad_out_BHCd)
    grad_q_BHTd, grad_k_BHSd, grad_v_BHSd = (mx.concatenate(parts[::-1], axis=2) for parts in (grad_q, grad_k, grad_v))
    return grad_q_BHTd, grad_k_BHSd, grad_v_BHSd


def _accumulate(parts: list[mx.array], first_keys: mx.array) -> None:
    """Accumulate one block's gradient into the key-prefix gradients, which are stored last-first."""
    if parts:
        n_keys, last = first_keys.shape[2], parts.pop()
        parts.append(last[:, :, n_keys:])
        first_keys = first_keys + last[:, :, :n_keys]
    parts.append(first_keys)


_attention = with_vjp(_forward, _backward)
