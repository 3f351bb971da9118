"""Attention in blocks of queries, and its gradient, against the textbook's in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_moe.kernel_sizes import MLX_QUERIES
from mlx_moe.model.cpu.attention import blocked_attention

B, H, D = 2, 3, 8
LENGTHS = [(1, 1), (1, 130), (MLX_QUERIES, MLX_QUERIES), (MLX_QUERIES + 1, MLX_QUERIES + 1), (150, 150), (70, 200)]


@pytest.mark.parametrize(("n_queries", "n_keys"), LENGTHS)
def test_output_and_gradients(n_queries, n_keys):
    rng = np.random.default_rng(n_queries)
    q, k, v, by_out = (rng.normal(size=(B, H, n, D)).astype(np.float32) for n in (n_queries, n_keys, n_keys, n_queries))
    outputs, gradients = mx.vjp(blocked_attention, [mx.array(x) for x in (q, k, v)], [mx.array(by_out)])
    out, by_inputs = textbook(*(x.astype(np.float64) for x in (q, k, v, by_out)))
    np.testing.assert_allclose(np.array(outputs[0]), out, atol=1e-6)
    for ours, expected in zip(gradients, by_inputs, strict=True):
        np.testing.assert_allclose(np.array(ours), expected, atol=5e-6)


def test_scores_that_are_large_and_far_apart():
    rng = np.random.default_rng(0)
    q, k, v = (100 * rng.normal(size=(1, 1, 100, D)).astype(np.float32) for _ in range(3))
    out, _ = textbook(*(x.astype(np.float64) for x in (q, k, v, v)))
    np.testing.assert_allclose(np.array(blocked_attention(*map(mx.array, (q, k, v)))), out, rtol=2e-3, atol=1e-3)


def test_a_query_that_is_not_a_number_spoils_its_own_row_only():
    q, k, v = (np.ones((1, 1, 100, D), np.float32) for _ in range(3))
    q[0, 0, 70] = np.nan
    is_nan = np.isnan(np.array(blocked_attention(*map(mx.array, (q, k, v))))).any(axis=-1)[0, 0]
    assert is_nan.nonzero()[0].tolist() == [70]


def textbook(q, k, v, by_out):
    """softmax(QKᵀ/√d)V and the gradients of q, k and v, all (B, H, T or S, d)."""
    scale = q.shape[-1] ** -0.5
    n_queries, n_keys = q.shape[2], k.shape[2]
    scores = scale * q @ k.swapaxes(-1, -2)
    scores[..., np.arange(n_keys) > np.arange(n_keys - n_queries, n_keys)[:, None]] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    by_p = by_out @ v.swapaxes(-1, -2)
    by_scores = scale * p * (by_p - (p * by_p).sum(axis=-1, keepdims=True))
    return p @ v, (by_scores @ k, by_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ by_out)
