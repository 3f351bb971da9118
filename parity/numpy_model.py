"""Reference model in plain NumPy, float64 by default, sharing no code with the backends.

B batch, T time, N tokens (B·T), D model, H query heads, G key-value heads, d head, F ffn, E experts, K experts per
token, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import layer_of

Array = NDArray[Any]
Module = Callable[..., Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def erf(x: Array) -> Array:
    """Return the error function of x, in the dtype of x."""
    y: Array = _erf(x).astype(x.dtype)
    return y


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


@dataclass(frozen=True)
class ModuleCall:
    """Inputs and output of one module."""

    inputs: tuple[Array, ...]
    output: Array


@dataclass(frozen=True)
class ForwardTrace:
    """Record of a forward pass. `calls` holds every module in the order they finish: children before their parent."""

    logits_BTV: Array
    calls: dict[str, ModuleCall]
    router_logits_LNE: Array  # L layers with experts
    experts_LNK: NDArray[np.int64]


class NumpyModel:
    """Model whose modules are named like their parameters: `layers.0.self_attn`, `layers.0.mlp.router`, ...

    In float32 it is the plainest implementation possible, so its error is the cost of float32 itself.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], dtype: type[np.floating[Any]] = np.float64):
        self.config = config
        self.dtype = dtype
        self.weights = {name: np.asarray(array, dtype) for name, array in weights.items()}
        self._calls: dict[str, ModuleCall] = {}

    def __call__(self, tokens_BT: NDArray[np.int32], experts_LNK: NDArray[np.int64] | None = None) -> ForwardTrace:
        """Run tokens (B, T); `experts_LNK` replaces the routers' choices."""
        self._calls = {}
        logits_BTV = self.module("lm_head", run_modules(self.config, tokens_BT, self.module, experts_LNK))
        calls, self._calls = self._calls, {}
        blocks = [f"layers.{layer}" for layer in self.config.expert_layers]
        return ForwardTrace(
            logits_BTV=logits_BTV,
            calls=calls,
            router_logits_LNE=np.array([calls[f"{block}.mlp.router"].output for block in blocks]),
            experts_LNK=np.array([calls[f"{block}.mlp.experts"].inputs[1] for block in blocks], np.int64),
        )

    def module(self, name: str, *inputs: Array) -> Array:
        """Return the output (…, D) of one module for x (…, D).

        An `mlp` also takes forced experts (N, K); a MoE's `experts` needs them. A tied head is called `lm_head`, too.
        """
        kind = name.rpartition(".")[2]
        x, *forced = (array if array.dtype.kind == "i" else array.astype(self.dtype) for array in inputs)
        output: Array
        if kind in ("embed_tokens", "embed_positions"):
            output = self.weights[f"{name}.weight"][x]
        elif kind.endswith("norm"):
            output = self._norm(name, x, kind in ("q_norm", "k_norm") or self.config.normalization == "rmsnorm")
        elif kind == "self_attn":
            output = self._attention(name, x)
        elif kind == "mlp":
            has_experts = layer_of(name) in self.config.expert_layers
            output = self._moe(name, x, *forced) if has_experts else self._hidden(name, x, self.module)
        elif kind == "shared_expert":
            output = self._hidden(name, x, self.module)
        elif kind == "experts":
            output = self._experts(name, x, forced[0])
        elif kind == "lm_head" and self.config.weight_tying:
            output = x @ self.weights["embed_tokens.weight"].T
        else:
            output = self._linear(name, x)
        self._calls[name] = ModuleCall((x, *forced), output)
        return output

    def _linear(self, name: str, x: Array, expert: int | None = None) -> Array:
        part = () if expert is None else expert
        y = x @ self.weights[f"{name}.weight"][part].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias[part]

    def _norm(self, name: str, x: Array, is_rms: bool) -> Array:
        """Apply LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), which has no mean and no bias."""
        if not is_rms:
            x = x - _mean(x)
        y = x / np.sqrt(_mean(x * x) + self.config.norm_eps) * self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _attention(self, name: str, x_BTD: Array) -> Array:
        config, (n_batch, n_time, _) = self.config, x_BTD.shape
        q_BHTd, k_BGTd, v_BGTd = (
            self.module(f"{name}.{letter}_proj", x_BTD).reshape(n_batch, n_time, -1, config.head_dim).swapaxes(1, 2)
            for letter in "qkv"
        )
        if config.qk_norm:
            q_BHTd, k_BGTd = self.module(f"{name}.q_norm", q_BHTd), self.module(f"{name}.k_norm", k_BGTd)
        if config.position_encoding == "rope":
            q_BHTd, k_BGTd = self.rotate(q_BHTd), self.rotate(k_BGTd)
        out_BHTd = np.empty_like(q_BHTd)
        for head in range(config.n_heads):
            group = head * config.n_kv_heads // config.n_heads
            scores_BTT = q_BHTd[:, head] @ k_BGTd[:, group].swapaxes(-1, -2) / math.sqrt(config.head_dim)
            scores_BTT = np.where(np.tri(n_time, dtype=bool), scores_BTT, -np.inf)
            out_BHTd[:, head] = softmax(scores_BTT) @ v_BGTd[:, group]
        return self.module(f"{name}.o_proj", out_BHTd.swapaxes(1, 2).reshape(n_batch, n_time, -1))

    def rotate(self, x_BHTd: Array, back: bool = False) -> Array:
        """Rotate by position (RoPE, Su et al. 2021), coordinate i paired with i + d/2; `back` inverts the rotation."""
        half = self.config.head_dim // 2
        frequencies = _scaled(self.config, self.config.rope_theta ** -(np.arange(half) / half)).astype(self.dtype)
        angles = np.arange(x_BHTd.shape[2], dtype=self.dtype)[:, None] * frequencies
        cos, sin = np.cos(angles), np.sin(-angles if back else angles)
        first, second = x_BHTd[..., :half], x_BHTd[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _hidden(self, name: str, x: Array, linear: Module) -> Array:
        activate = ACTIVATIONS[self.config.activation]
        up = linear(f"{name}.up_proj", x)
        hidden = activate(linear(f"{name}.gate_proj", x)) * up if self.config.ffn_type == "swiglu" else activate(up)
        return linear(f"{name}.down_proj", hidden)

    def _moe(self, name: str, x_BTD: Array, experts_NK: NDArray[np.int64] | None = None) -> Array:
        assert self.config.moe is not None
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = self.module(f"{name}.router", x_ND)
        if experts_NK is None:
            experts_NK = best_experts(logits_NE, self.config.moe.top_k)
        gates_NK = softmax(np.take_along_axis(logits_NE, experts_NK, axis=-1))
        y_NKD = self.module(f"{name}.experts", x_ND, experts_NK)
        y_ND = (y_NKD * gates_NK[..., None]).sum(axis=1)
        if self.config.moe.shared_d_ff:
            y_ND = y_ND + self.module(f"{name}.shared_expert", x_ND)
        return y_ND.reshape(x_BTD.shape)

    def _experts(self, name: str, x_ND: Array, experts_NK: NDArray[np.int64]) -> Array:
        y_NKD = np.empty((*experts_NK.shape, x_ND.shape[-1]), self.dtype)
        for expert in np.unique(experts_NK):
            tokens, places = np.nonzero(experts_NK == expert)
            y_NKD[tokens, places] = self._hidden(name, x_ND[tokens], partial(self._linear, expert=int(expert)))
        return y_NKD


def run_modules(
    config: ModelConfig, tokens_BT: NDArray[np.int32], module: Module, experts_LNK: NDArray[np.int64] | None = None
) -> Array:
    """Return the head's input (B, T, D), computed by calls of `module(name, *inputs)`: this model's or a backend's."""
    x_BTD = module("embed_tokens", tokens_BT)
    if config.position_encoding == "learned_absolute":
        x_BTD = x_BTD + module("embed_positions", np.arange(tokens_BT.shape[1]))
    for layer in range(config.n_layers):
        block = f"layers.{layer}"
        forced: tuple[Array, ...] = ()
        if experts_LNK is not None and layer in config.expert_layers:
            forced = (experts_LNK[config.expert_layers.index(layer)],)
        for sublayer, norm, extra in (
            ("self_attn", "input_layernorm", ()),
            ("mlp", "post_attention_layernorm", forced),
        ):
            if config.norm_position == "pre":
                normed_BTD = module(f"{block}.{norm}", x_BTD)
                x_BTD = x_BTD + module(f"{block}.{sublayer}", normed_BTD, *extra)
            else:
                x_BTD = module(f"{block}.{norm}", x_BTD + module(f"{block}.{sublayer}", x_BTD, *extra))
    return module("norm", x_BTD)


def best_experts(router_logits: Array, k: int) -> NDArray[np.int64]:
    """Return the top-k experts (…, K) by falling logit, ties to the lower index."""
    return np.argsort(-router_logits, axis=-1, kind="stable")[..., :k]


def _scaled(config: ModelConfig, frequencies: Array) -> Array:
    """Scale RoPE frequencies by wavelength, as Llama 3.1 does; without an original context, slow down all of them."""
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    context, low, high = scaling.original_context_length, scaling.low_freq_factor, scaling.high_freq_factor
    slowed = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            frequency /= scaling.factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency *= (1 - smooth) / scaling.factor + smooth
        slowed.append(frequency)
    return np.array(slowed)


def _mean(x: Array) -> Array:
    """Return the mean over the last axis, added up sequentially: the least accurate order, which MLX uses on CPUs."""
    mean: Array = np.cumsum(x, axis=-1)[..., -1:] / x.dtype.type(x.shape[-1])
    return mean


def softmax(x: Array) -> Array:
    """Return the softmax over the last axis."""
    weights: Array = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
