"""Exponentials at the speed of the CPU's vector units.

MLX's CPU kernels for exp, tanh and erf take 20 to 45 ns a number on one thread, most of a training step there. The
polynomials here compile to vector code, at 2 to 3 ns, and are as accurate in float32.

What MLX 0.32 compiles for CPUs is vector code only where every input of a kernel is a whole array or a Python number,
and it puts at most 11 operations in a row into one kernel. Hence the ends of kernels that are set here by hand, and
minima by integers: a floating-point one looks for NaN and is not vectorized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class Sigmoid(NamedTuple):
    """Rational function h(x) = x·above(x²) / below(x²) for 0 ≤ x ≤ end, and ½ beyond; lowest powers first.

    Fitted to a relative error below 3e-8, by least squares reweighted towards the largest; evaluated in float32, 4e-7.
    """

    end: float
    above: tuple[float, ...]
    below: tuple[float, ...]


# Curves of an activation x·(½ + sign(x)·h(|x|)): first h, then g of its derivative ½ + sign(x)·g(|x|).
GELU = (
    Sigmoid(
        5.7,
        (0.39894226, 0.034438558, 0.0047065732, 0.00017376035, 6.289185e-06, 2.1695605e-08),
        (1.0, 0.2529909, 0.028963879, 0.0019131812, 7.4709002e-05, 1.1619568e-06),
    ),
    Sigmoid(
        6.2,
        (
            0.79788458,
            -0.035261862,
            0.014715294,
            -4.275575e-05,
            4.0241775e-05,
            3.2843903e-07,
            2.9037334e-08,
            8.5929694e-11,
        ),
        (1.0, 0.28913912, 0.039822631, 0.0034399088, 0.00020577556, 8.8095903e-06, 2.6499174e-07, 5.2232059e-09),
    ),
)
GELU_TANH = (
    Sigmoid(
        5.565,
        (0.39894229, 0.030424412, 0.0036467782, 0.00013468535, 7.1583308e-06, 2.480011e-08),
        (1.0, 0.24375466, 0.024395354, 0.0013075458, 7.6580698e-05, 1.344604e-06),
    ),
    Sigmoid(
        5.88,
        (
            0.79788458,
            -0.05286698,
            0.014081021,
            -0.0003634207,
            3.7487895e-05,
            -1.8327698e-07,
            2.8011804e-08,
            8.2924979e-11,
        ),
        (1.0, 0.26872438, 0.03095096, 0.0017618836, 0.00013460944, 4.7765616e-06, 1.7270197e-07, 5.2409783e-09),
    ),
)
SILU = (
    Sigmoid(
        17.5,
        (0.25, 0.0086651854, 6.4141794e-05, 1.2986635e-07, 4.5402116e-11, -7.9998052e-15, 1.6613369e-18),
        (1.0, 0.11799407, 0.0017560734, 6.8289196e-06, 6.5966894e-09),
    ),
    Sigmoid(
        21.0,
        (0.5, 0.032618288, 0.0014102877, 1.8234467e-05, 9.3996029e-08, 1.2319354e-10, 1.6446866e-14),
        (1.0, 0.23190318, 0.016471164, 0.00035707501, 3.0021079e-06, 8.3722931e-09, 4.2691475e-12),
    ),
)
# e⁻ʳ for |r| ≤ ln 2 / 2, to 3e-9.
EXP = (1.0, -1.0, 0.49999993, -0.16666521, 0.041668388, -0.0083687169, 0.0013814598)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts, the first exact in few bits (Cody & Waite 1980)
ROUNDING = 1.5 * 2.0**23  # added to a smaller number, leaves its nearest whole number in the last bits


def row_sums(x: mx.array) -> mx.array:
    """Sum over the last axis, which stays. BLAS adds in many lanes, MLX in four: faster, and more accurate."""
    return x @ mx.ones((x.shape[-1], 1))


def column_sums(x: mx.array) -> mx.array:
    """Sum over all axes but the last, by BLAS too."""
    rows = x.reshape(-1, x.shape[-1])
    return (mx.ones((1, len(rows))) @ rows)[0]


def fusion_barrier(x: mx.array) -> mx.array:
    """Return `x`, which `mx.compile` does not fuse with the operations after it."""
    return x.view(mx.int32).view(mx.float32)


def with_vjp(function: Callable[..., Any], vjp: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function its gradient: `vjp(inputs, cotangents, outputs)`."""
    differentiable: Any = mx.custom_function(function)
    differentiable.vjp(vjp)
    return differentiable


def _with_gradient(
    function: Callable[[mx.array], mx.array], gradient: Callable[[mx.array, mx.array, mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """Give a function a gradient, which bit casts lack. `gradient` takes the input, the cotangent and the output."""
    return with_vjp(mx.compile(function), mx.compile(gradient))


def _activation(value: Sigmoid, derivative: Sigmoid) -> Callable[[mx.array], mx.array]:
    return _with_gradient(
        lambda x: 0.5 * x + mx.abs(x) * _sigmoid(value, x),
        # Other bits than above, of which mx.compile would else keep those that both read until the gradient is due.
        lambda x, cotangent, y: cotangent * (0.5 + mx.sign(x) * _sigmoid(derivative, x, mx.uint32)),
    )


def _sigmoid(h: Sigmoid, x: mx.array, bits: mx.Dtype = mx.int32) -> mx.array:
    """Return h(|x|)."""
    x = _size(x, h.end, bits)
    return fusion_barrier(x * _polynomial(h.above, x * x) / _polynomial(h.below, x * x))


def _exp(x: mx.array) -> mx.array:
    """Return max(0, eˣ − 2⁻⁶⁴) for x ≤ 0, as 2⁻ⁿ·e⁻ʳ with whole n, whose bits are put together.

    So a masked score leaves no denormal number in a product: CPUs multiply these a hundred times slower.
    """
    x = _size(x, 64 * math.log(2))
    rounded = fusion_barrier(x * (1 / math.log(2)) + ROUNDING)
    n = rounded - ROUNDING
    power = fusion_barrier(_polynomial(EXP, x - n * LN2_HIGH - n * LN2_LOW))
    half_of_two_to_minus_n = mx.left_shift(_bits(ROUNDING) + 126 - rounded.view(mx.int32), 23).view(mx.float32)
    half = power * half_of_two_to_minus_n - 2.0**-65
    return fusion_barrier(half + mx.abs(half))


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> Any:
    """Evaluate by pairs, pairs of pairs, … (Estrin), in a shorter chain of operations than term by term."""
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:
        pairs = [low + high * x for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
        x = x * x
    return terms[0]


def _size(x: mx.array, limit: float, bits: mx.Dtype = mx.int32) -> mx.array:
    """Return min(|x|, limit), by the bits: without the sign's, they order floats by size."""
    return mx.minimum(mx.bitwise_and(x.view(bits), 0x7FFFFFFF), _bits(limit)).view(mx.float32)


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def _softmax_forward(x: mx.array) -> mx.array:
    largest = x.max(axis=-1, keepdims=True)
    powers = _exp(x - largest)
    return fusion_barrier(powers / (row_sums(powers) + (largest - largest)))  # which keeps a NaN


def _logsumexp_forward(x: mx.array) -> mx.array:
    largest = x.max(axis=-1, keepdims=True)
    return (mx.log(row_sums(_exp(x - largest))) + largest).squeeze(-1)


softmax = _with_gradient(_softmax_forward, lambda x, cotangent, y: y * (cotangent - row_sums(cotangent * y)))
# Not exp(x − y): rounding y, which may be large, would change every probability.
logsumexp = _with_gradient(_logsumexp_forward, lambda x, cotangent, y: cotangent[..., None] * _softmax_forward(x))
gelu, gelu_tanh, silu = (_activation(*curves) for curves in (GELU, GELU_TANH, SILU))
