"""Layer norm and RMS norm: on CPU with sums by BLAS and a gradient of their own, on GPUs MLX's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from mlx_moe.model.elementwise import column_sums, end_of_kernel, float32_on_cpu, row_sums, with_vjp

FEW_ROWS = 16


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """(x − mean) / √(variance + ε), over the last axis, times the weight, plus the bias (Ba et al. 2016)."""
    if not _by_blas(x):
        return mx.fast.layer_norm(x, weight, bias, eps)
    return _norm(eps, centred=True)(x, weight, *([] if bias is None else [bias]))[0]


def rms_norm(x: mx.array, weight: mx.array, _: mx.array | None, eps: float) -> mx.array:
    """x / √(mean of x² + ε), over the last axis, times the weight (Zhang & Sennrich 2019)."""
    return _norm(eps, centred=False)(x, weight)[0] if _by_blas(x) else mx.fast.rms_norm(x, weight, eps)


def _by_blas(x: mx.array) -> bool:
    """But for a few rows, as when generating, which are done before Python has called so many functions."""
    return float32_on_cpu(x) and x.size > FEW_ROWS * x.shape[-1]


@lru_cache
def _norm(eps: float, centred: bool) -> Callable[..., tuple[mx.array, ...]]:
    """From x, the weight and perhaps a bias: the norm; and what its gradient needs."""

    def forward(x: mx.array, weight: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
        d = x.shape[-1]
        x = x - row_sums(x) / d if centred else x
        scale = mx.rsqrt(row_sums(mx.square(x)) / d + eps)
        normed = end_of_kernel(x * scale)
        y = normed * weight
        return y + bias[0] if bias else y, normed, scale

    def backward(primals: list[mx.array], by: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
        _, weight, *bias = primals
        by_y, (_, normed, scale) = by[0], outputs
        by_weight = end_of_kernel(by_y * normed)  # of each row
        along = normed * _mean_by(by_weight, weight)
        by_x = (by_y * weight - (_mean_by(by_y, weight) + along if centred else along)) * scale
        return by_x, column_sums(by_weight), *(column_sums(by_y) for _ in bias)

    return with_vjp(mx.compile(forward), mx.compile(backward))


def _mean_by(x: mx.array, weight: mx.array) -> mx.array:
    """The mean of each row times the weight."""
    return x @ weight[:, None] / weight.size
