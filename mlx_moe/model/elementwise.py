"""Exponentials at the speed of the CPU's vector units.

MLX's CPU kernels for exp and erf take 20 to 40 ns a number on one thread, most of a training step there. The
polynomials here compile to vector code, at 5 ns, and are as accurate in float32. GPUs and other dtypes take MLX's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# (eʳ − 1 − r) / r² for |r| ≤ ln 2 / 2, Chebyshev fit; and erf(x) / x as a ratio of polynomials in x², for |x| ≤ 3.92
# (fitted by least squares in relative error, reweighted towards the largest). Lowest power first.
EXP = (0.5, 0.16666576266288757, 0.04166646674275398, 0.008363181725144386, 0.0013933652080595493)
ERF_ABOVE = (
    *(1.1283791065216064, 0.19038932025432587, 0.0527464933693409),
    *(0.0037648999132215977, 0.0002848695730790496, 2.0502509414654924e-06),
)
ERF_BELOW = (
    *(1.0, 0.5020608901977539, 0.1141020655632019),
    *(0.01496776845306158, 0.0011623678728938103, 3.8092741306172684e-05),
)
ERF_IS_ONE = 3.92
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts, the first exact in few bits (Cody & Waite 1980)


def logsumexp(x: mx.array) -> mx.array:
    """Over the last axis."""
    return _logsumexp(x) if _by_polynomial(x) else mx.logsumexp(x, axis=-1)


def gelu(x: mx.array) -> mx.array:
    """x·Φ(x) (Hendrycks & Gimpel 2016)."""
    return _gelu(x) if _by_polynomial(x) else nn.gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU by tanh, as in GPT-2; ½(1 + tanh u) is the sigmoid of 2u."""
    if not _by_polynomial(x):
        return nn.gelu_approx(x)
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def silu(x: mx.array) -> mx.array:
    """x·σ(x)."""
    return x * _sigmoid(x) if _by_polynomial(x) else nn.silu(x)


def on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _by_polynomial(x: mx.array) -> bool:
    return x.dtype == mx.float32 and on_cpu()


def _with_gradient(
    function: Callable[[mx.array], mx.array], gradient: Callable[[mx.array, mx.array, mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """`gradient` takes the input, the cotangent and the output; rounding and bit casts have none of their own."""
    differentiable: Any = mx.custom_function(mx.compile(function))
    differentiable.vjp(mx.compile(gradient))
    return differentiable


def _exp(x: mx.array) -> mx.array:
    """2ⁿ·eʳ with |r| ≤ ln 2 / 2; 2ⁿ is put together from its bits."""
    x = mx.clip(x, -87.0, 88.0)
    n = mx.floor(x * (1 / math.log(2)) + 0.5)
    r = x - n * LN2_HIGH - n * LN2_LOW
    two_to_n = ((n.astype(mx.int32) + 127) << 23).view(mx.float32)
    return (1.0 + r + r * r * _polynomial(EXP, r)) * two_to_n


def _normal_cdf(x: mx.array) -> mx.array:
    z = mx.clip(x * math.sqrt(0.5), -ERF_IS_ONE, ERF_IS_ONE)
    erf = z * _polynomial(ERF_ABOVE, z * z) / _polynomial(ERF_BELOW, z * z)
    return 0.5 + 0.5 * mx.where(mx.abs(z) < ERF_IS_ONE, erf, mx.sign(z))


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    result = mx.array(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _logsumexp_forward(x: mx.array) -> mx.array:
    largest = x.max(axis=-1, keepdims=True)
    return mx.log(_exp(x - largest).sum(axis=-1)) + largest.squeeze(-1)


_logsumexp = _with_gradient(_logsumexp_forward, lambda x, cotangent, y: cotangent[..., None] * _exp(x - y[..., None]))
_sigmoid = _with_gradient(lambda x: 1 / (1 + _exp(-x)), lambda x, cotangent, y: cotangent * y * (1 - y))
_gelu = _with_gradient(
    lambda x: x * _normal_cdf(x),
    lambda x, cotangent, y: cotangent * (_normal_cdf(x) + x * _exp(-0.5 * x * x) / math.sqrt(2 * math.pi)),
)
