"""Layer norm and RMS norm, and their gradients, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_moe.model.functional import layer_norm, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(mean, with_bias):
    x, weight, bias, by_y = random(mean)
    bias = bias if with_bias else 0 * bias
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = (np.square(centred).mean(axis=-1, keepdims=True) + EPS) ** -0.5
    y = centred * scale
    by_x = gradient(by_y * weight, y, scale)
    by_x -= by_x.mean(axis=-1, keepdims=True)

    def normalize(x, weight, bias):
        return layer_norm(x, weight, bias if with_bias else None, EPS)

    expected = by_x, (by_y * y).sum(axis=0), by_y.sum(axis=0) if with_bias else 0 * bias
    check(normalize, (x, weight, bias), by_y, y * weight + bias, expected, tolerance=1e-5 if mean else 2e-6)


def test_rms_norm():
    x, weight, _, by_y = random(0.5)
    scale = (np.square(x).mean(axis=-1, keepdims=True) + EPS) ** -0.5
    expected = gradient(by_y * weight, x * scale, scale), (by_y * x * scale).sum(axis=0)
    check(lambda x, weight: rms_norm(x, weight, None, EPS), (x, weight), by_y, x * scale * weight, expected, 2e-6)


def test_a_row_of_zeros_stays():
    ones = mx.ones(8)
    assert mx.array_equal(layer_norm(mx.zeros((20, 8)), ones, ones, EPS), mx.ones((20, 8)))
    assert mx.array_equal(rms_norm(mx.zeros((20, 8)), ones, None, EPS), mx.zeros((20, 8)))


def random(mean):
    """x, a weight, a bias and y's gradient, as float64 that float32 can hold."""
    rng = np.random.default_rng(0)
    shapes = (20, 64), (64,), (64,), (20, 64)
    x, weight, bias, by_y = (rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes)
    return (3 * x + mean).astype(np.float32).astype(np.float64), 1 + weight / 4, bias, by_y


def gradient(by_y, y, scale):
    """Of y = x·scale, the scale being such that the mean of y² is 1."""
    return scale * (by_y - y * (by_y * y).mean(axis=-1, keepdims=True))


def check(function, inputs, by_y, expected, expected_gradients, tolerance):
    arrays = [mx.array(x.astype(np.float32)) for x in inputs]
    outputs, gradients = mx.vjp(function, arrays, [mx.array(by_y.astype(np.float32))])
    np.testing.assert_allclose(np.array(outputs[0]), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.array(ours), theirs, rtol=tolerance, atol=10 * tolerance)
