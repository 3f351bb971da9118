"""Layer norm and RMS norm with sums by BLAS and a gradient of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from mlx_moe.model.cpu.elementwise import column_sums, fusion_barrier, row_sums, with_vjp


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Return (x − mean) / √(variance + ε) over the last axis, times the weight, plus the bias.

    x (..., D), weight and bias (D,), float32.
    """
    return _norm(eps, centred=True)(x, weight, *([] if bias is None else [bias]))[0]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return x / √(mean of x² + ε) over the last axis, times the weight.

    x (..., D), weight (D,), float32.
    """
    return _norm(eps, centred=False)(x, weight)[0]


@lru_cache
def _norm(eps: float, centred: bool) -> Callable[..., tuple[mx.array, ...]]:
    """Return a function of x, the weight and perhaps a bias: the norm, and the arrays that its gradient needs."""

    def forward(x: mx.array, weight: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
        d = x.shape[-1]
        x = x - row_sums(x) / d if centred else x
        scale = mx.rsqrt(row_sums(mx.square(x)) / d + eps)
        normed = fusion_barrier(x * scale)
        y = normed * weight
        return y + bias[0] if bias else y, normed, scale

    def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
        _, weight, *bias = primals
        grad_y, (_, normed, scale) = cotangents[0], outputs
        grad_weight = fusion_barrier(grad_y * normed)  # a row each
        along = normed * _weighted_mean(grad_weight, weight)
        grad_x = (grad_y * weight - (_weighted_mean(grad_y, weight) + along if centred else along)) * scale
        return grad_x, column_sums(grad_weight), *(column_sums(grad_y) for _ in bias)

    return with_vjp(mx.compile(forward), mx.compile(backward))


def _weighted_mean(x: mx.array, weight: mx.array) -> mx.array:
    """Return the mean of each row times the weight."""
    return x @ weight[:, None] / weight.size
