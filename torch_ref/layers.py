"""Norms, activations and feed-forward networks. B batch, T time, D model, F ffn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_moe.config import LoRAConfig, ModelConfig
from mlx_moe.parameters import FFN_INPUTS, NORMS_WITH_BIAS


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "layernorm": layer_norm,
    "layernorm_nobias": layer_norm,
    "rmsnorm": lambda x, weight, _, eps: F.rms_norm(x, weight.shape, weight, eps),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.01),
}

Activation = Callable[[Tensor], Tensor]
ProjectionFunction = Callable[[str], Tensor]


def standard_ffn(project: ProjectionFunction, activate: Activation) -> Tensor:
    return activate(project("up_proj"))


def swiglu_ffn(project: ProjectionFunction, activate: Activation) -> Tensor:
    """Gated FFN (Shazeer 2020); SwiGLU where the activation is SiLU."""
    return activate(project("gate_proj")) * project("up_proj")


# From the projections of the input to the hidden neurons; dense FFNs and experts share them.
FFN_TYPES: dict[str, Callable[[ProjectionFunction, Activation], Tensor]] = {
    "standard": standard_ffn,
    "swiglu": swiglu_ffn,
}


class Linear(nn.Linear):
    """Float32 weights, multiplied in the dtype of the input; with an adapter, A (rank, in) and B (out, rank)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, adapter: LoRAConfig | None = None):
        super().__init__(n_in, n_out, bias)
        self._scale = adapter.alpha / adapter.rank if adapter else 0.0
        if adapter:
            self.lora_a = nn.Parameter(torch.zeros(adapter.rank, n_in))
            self.lora_b = nn.Parameter(torch.zeros(n_out, adapter.rank))

    def reset_parameters(self) -> None:
        """Leave them: all weights are loaded, and PyTorch's own initial ones would load its compiler (two seconds)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if not self._scale:
            return y
        return y + self._scale * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        has_bias = config.normalization in NORMS_WITH_BIAS
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if has_bias else None
        self._normalize = NORMALIZATIONS[config.normalization]
        self._eps = config.norm_eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._normalize(x_BTD, self.weight, self.bias, self._eps)


class FFN(nn.Module):
    def __init__(self, config: ModelConfig, d_ff: int):
        super().__init__()
        for name in FFN_INPUTS[config.ffn_type]:
            self.add_module(name, Linear(config.d_model, d_ff, config.bias, config.adapter(name)))
        self.down_proj = Linear(d_ff, config.d_model, config.bias, config.adapter("down_proj"))
        self._combine = FFN_TYPES[config.ffn_type]
        self._activate = ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self._combine(lambda name: getattr(self, name)(x_BTD), self._activate)
        return self.down_proj(hidden_BTF)
