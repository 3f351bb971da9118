"""The functions that layers are made of: MLX's own, and on a CPU those of `cpu/` in their place.

B batch, T time, S keys, H query heads, G key-value heads, d head, h half of a head, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_moe.model.cpu import elementwise, norms
from mlx_moe.model.cpu.attention import blocked_attention
from mlx_moe.model.cpu.experts import block_products, gathered_products
from mlx_moe.model.cpu.one_token import rotate_token, rotation

FEW_NUMBERS = 2048  # as in decoding, where to start an operation takes longer than its numbers; this takes two
FEW_ROWS = 16  # as in decoding, where calling so many functions from Python takes longer than BLAS saves


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU at this moment."""
    return mx.default_device().type == mx.DeviceType.cpu


def float32_on_cpu(x: mx.array) -> bool:
    """Return whether the functions of `cpu/` take `x`."""
    return x.dtype == mx.float32 and on_cpu()


def compute_in_float32_on_cpu(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compute a function of arrays in float32 on a CPU, and round the result back to their dtype.

    MLX's CPU kernels for half precision are ten times slower, or missing. GPUs, too, add up products in float32.
    """

    @wraps(function)
    def compute(*arrays: mx.array) -> mx.array:
        dtype = arrays[0].dtype
        if dtype == mx.float32 or not on_cpu():
            return function(*arrays)
        return function(*(array.astype(mx.float32) for array in arrays)).astype(dtype)

    return compute


matmul = compute_in_float32_on_cpu(mx.matmul)
addmm = compute_in_float32_on_cpu(mx.addmm)


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return x·Wᵀ + b in the dtype of x; weight (out, in), bias (out,)."""
    weight = weight.astype(x.dtype).T
    return matmul(x, weight) if bias is None else addmm(bias.astype(x.dtype), x, weight)


@compute_in_float32_on_cpu
def gelu(x: mx.array) -> mx.array:
    """Return x·Φ(x) (Hendrycks & Gimpel 2016)."""
    return elementwise.gelu(x) if float32_on_cpu(x) else nn.gelu(x)


@compute_in_float32_on_cpu
def gelu_tanh(x: mx.array) -> mx.array:
    """Return GELU by tanh, as in GPT-2."""
    return elementwise.gelu_tanh(x) if float32_on_cpu(x) else nn.gelu_approx(x)


@compute_in_float32_on_cpu
def silu(x: mx.array) -> mx.array:
    """Return x·σ(x)."""
    if not float32_on_cpu(x):
        return nn.silu(x)
    return x * mx.sigmoid(x) if x.size <= FEW_NUMBERS else elementwise.silu(x)


def softmax(x: mx.array) -> mx.array:
    """Return the softmax over the last axis."""
    return elementwise.softmax(x) if float32_on_cpu(x) else mx.softmax(x, axis=-1, precise=True)


def logsumexp(x: mx.array) -> mx.array:
    """Return log Σ eˣ over the last axis."""
    return elementwise.logsumexp(x) if float32_on_cpu(x) else mx.logsumexp(x, axis=-1)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array | None, eps: float) -> mx.array:
    """Return (x − mean) / √(variance + ε) over the last axis, times the weight, plus the bias (Ba et al. 2016)."""
    return (norms.layer_norm if _norms_by_blas(x) else mx.fast.layer_norm)(x, weight, bias, eps)


def rms_norm(x: mx.array, weight: mx.array, _: mx.array | None, eps: float) -> mx.array:
    """Return x / √(mean of x² + ε) over the last axis, times the weight (Zhang & Sennrich 2019)."""
    return (norms.rms_norm if _norms_by_blas(x) else mx.fast.rms_norm)(x, weight, eps)


def _norms_by_blas(x: mx.array) -> bool:
    """Use BLAS except for small inputs (decoding), where Python overhead dominates."""
    return float32_on_cpu(x) and x.size > FEW_ROWS * x.shape[-1]


@compute_in_float32_on_cpu
def causal_attention(q_BHTd: mx.array, k_BGSd: mx.array, v_BGSd: mx.array) -> mx.array:
    """Return softmax(QKᵀ/√d)V, (B, H, T, d); query t sees the keys up to S − T + t."""
    n_queries = q_BHTd.shape[2]
    if on_cpu() and n_queries > 1:  # MLX fuses attention on GPUs only
        return blocked_attention(q_BHTd, *repeat_heads(q_BHTd, k_BGSd, v_BGSd))
    mask = "causal" if n_queries > 1 else None
    scale = q_BHTd.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, scale=scale, mask=mask)


def rotate(x_BHTd: mx.array, offset: int, frequencies_h: tuple[float, ...]) -> mx.array:
    """Rotate queries or keys by their positions from `offset`; `frequencies_h` in radians per position."""
    if x_BHTd.shape[2] == 1 and float32_on_cpu(x_BHTd):
        return rotate_token(x_BHTd, *rotation(offset, frequencies_h))
    periods_h = _periods(frequencies_h)
    return mx.fast.rope(
        x_BHTd, x_BHTd.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods_h
    )


@lru_cache(maxsize=8)
def _periods(frequencies_h: tuple[float, ...]) -> mx.array:
    """Return positions per radian, which all layers share."""
    periods_h = mx.array(1 / np.array(frequencies_h), mx.float32)
    mx.eval(periods_h)
    return periods_h


def repeat_heads(q_BHTd: mx.array, k_BGSd: mx.array, v_BGSd: mx.array) -> tuple[mx.array, mx.array]:
    """Return keys and values of their own for each query head, (B, H, S, d) each."""
    group = q_BHTd.shape[1] // k_BGSd.shape[1]
    return mx.repeat(k_BGSd, group, axis=1), mx.repeat(v_BGSd, group, axis=1)


def expert_products(x: mx.array, weight: mx.array, expert: mx.array) -> mx.array:
    """Multiply x (M, rows, in), each group by its expert's weight (E, out, in), in the dtype of x.

    `expert` (M,) is in rising order.
    """
    products = block_products if x.shape[1] > 1 else gathered_products
    return compute_in_float32_on_cpu(lambda x, weight: products(x, weight, expert))(x, weight.astype(x.dtype))
