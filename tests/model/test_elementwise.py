"""The CPU's polynomials against float64."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_moe.model import functional

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="GPUs take MLX's own functions")

X = np.concatenate([np.linspace(-12, 12, 4001), [-1000.0, -90.0, -87.0, 88.0, 1000.0]]).astype(np.float32)
X64 = X.astype(np.float64)
PHI = 0.5 * (1 + np.vectorize(math.erf)(X64 / math.sqrt(2)))
SIGMOID = 1 / (1 + np.exp(-np.clip(X64, -700, 700)))


@pytest.mark.parametrize(
    ("function", "expected", "expected_gradient"),
    [
        (functional.gelu, X64 * PHI, PHI + X64 * np.exp(-0.5 * X64**2) / math.sqrt(2 * math.pi)),
        (functional.silu, X64 * SIGMOID, SIGMOID * (1 + X64 * (1 - SIGMOID))),
    ],
)
def test_activations_and_their_gradients(function, expected, expected_gradient):
    np.testing.assert_allclose(np.array(function(mx.array(X))), expected, rtol=1e-6, atol=2e-6)
    gradient = mx.grad(lambda x: function(x).sum())(mx.array(X))
    np.testing.assert_allclose(np.array(gradient), expected_gradient, atol=2e-6)


def test_gelu_tanh_is_gpt2s():
    x = mx.array(X[np.abs(X) < 50])
    u = np.array(x, dtype=np.float64)
    expected = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    np.testing.assert_allclose(np.array(functional.gelu_tanh(x)), expected, rtol=1e-6, atol=2e-6)
    ours, theirs = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (functional.gelu_tanh, nn.gelu_approx))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=5e-6)


@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_logsumexp_and_its_gradient(offset):
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32) * 5 + np.float32(offset)
    largest = x.astype(np.float64).max(axis=-1)
    exponentials = np.exp(x.astype(np.float64) - largest[:, None])
    expected = np.log(exponentials.sum(axis=-1)) + largest
    np.testing.assert_allclose(np.array(functional.logsumexp(mx.array(x))), expected, rtol=1e-6, atol=1e-6)
    weights = mx.array(np.arange(1.0, 6.0, dtype=np.float32))
    gradient = mx.grad(lambda x: (functional.logsumexp(x) * weights).sum())(mx.array(x))
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.array(gradient), softmax * np.arange(1, 6)[:, None], atol=1e-6, rtol=1e-4)


def test_half_precision_is_computed_in_float32_and_rounded():
    x = mx.array(X[:4001]).astype(mx.bfloat16)
    assert functional.gelu(x).dtype == mx.bfloat16
    assert mx.array_equal(functional.gelu(x), functional.gelu(x.astype(mx.float32)).astype(mx.bfloat16))
