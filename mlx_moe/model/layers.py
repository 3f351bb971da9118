"""Norms, activations and feed-forward networks. B batch, T time, D model, F ffn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_moe.config import LoRAConfig, ModelConfig
from mlx_moe.model.functional import gelu, gelu_tanh, layer_norm, linear, rms_norm, silu
from mlx_moe.parameters import FFN_INPUTS, NORMS_WITH_BIAS

NORMALIZATIONS: dict[str, Callable[[mx.array, mx.array, mx.array | None, float], mx.array]] = {
    "layernorm": layer_norm,
    "layernorm_nobias": layer_norm,
    "rmsnorm": rms_norm,
}

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "relu": nn.relu,
    "leaky_relu": partial(nn.leaky_relu, negative_slope=0.01),
}

Activation = Callable[[mx.array], mx.array]
ProjectionFunction = Callable[[str], mx.array]


def standard_ffn(project: ProjectionFunction, activate: Activation) -> mx.array:
    return activate(project("up_proj"))


def swiglu_ffn(project: ProjectionFunction, activate: Activation) -> mx.array:
    """Gated FFN (Shazeer 2020); SwiGLU where the activation is SiLU."""
    return activate(project("gate_proj")) * project("up_proj")


# From the projections of the input to the hidden neurons; dense FFNs and experts share them.
FFN_TYPES: dict[str, Callable[[ProjectionFunction, Activation], mx.array]] = {
    "standard": standard_ffn,
    "swiglu": swiglu_ffn,
}


def dropout(x: mx.array, p: float, key: mx.array | None) -> mx.array:
    """Drop features with probability p; with a key, a block computed again for its gradient drops the same ones."""
    return x if p == 0 else x * mx.random.bernoulli(1 - p, x.shape, key) / (1 - p)


class Linear(nn.Linear):
    """Float32 weights, multiplied in the dtype of the input; with an adapter, A (rank, in) and B (out, rank)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, adapter: LoRAConfig | None = None):
        super().__init__(n_in, n_out, bias)
        self._scale = adapter.alpha / adapter.rank if adapter else 0.0
        if adapter:
            self.lora_a = mx.zeros((adapter.rank, n_in))
            self.lora_b = mx.zeros((n_out, adapter.rank))

    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self.weight, self.get("bias"))
        if not self._scale:
            return y
        return y + self._scale * linear(linear(x, self.lora_a), self.lora_b)


class Norm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = mx.ones(config.d_model)
        self.bias = mx.zeros(config.d_model) if config.normalization in NORMS_WITH_BIAS else None
        self._normalize = NORMALIZATIONS[config.normalization]
        self._eps = config.norm_eps

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return self._normalize(x_BTD, self.weight, self.bias, self._eps)


class FFN(nn.Module):
    def __init__(self, config: ModelConfig, d_ff: int):
        super().__init__()
        for name in FFN_INPUTS[config.ffn_type]:
            self[name] = Linear(config.d_model, d_ff, config.bias, config.adapter(name))
        self.down_proj = Linear(d_ff, config.d_model, config.bias, config.adapter("down_proj"))
        self._combine = FFN_TYPES[config.ffn_type]
        self._activate = ACTIVATIONS[config.activation]

    def __call__(self, x_BTD: mx.array) -> mx.array:
        hidden_BTF = self._combine(lambda name: self[name](x_BTD), self._activate)
        return self.down_proj(hidden_BTF)
