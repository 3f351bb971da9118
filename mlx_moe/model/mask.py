"""The causal mask. T queries, S keys."""

from __future__ import annotations

import mlx.core as mx


def causal_mask(n_queries: int, n_keys: int, dtype: mx.Dtype) -> mx.array:
    """Return a mask to add to scores, (T, S): the dtype's least number at keys that come after a query, else 0.

    The last query stands at the last key.
    """
    comes_after_TS = mx.arange(n_keys) > mx.arange(n_keys - n_queries, n_keys)[:, None]
    return mx.where(comes_after_TS, mx.finfo(dtype).min, 0).astype(dtype)
