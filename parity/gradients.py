"""Gradients of the NumPy model, derived by hand, sharing no code with either backend.

B batch, T time, N tokens (B·T), D model, H query heads, G key-value heads, d head, E experts, K experts per token,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import OptimizerConfig
from mlx_moe.parameters import layer_of, optimizer_groups, parameter_table
from mlx_moe.training.backend import Tokens
from parity.numpy_model import ACTIVATIONS, Array, ForwardTrace, NumpyModel, erf, softmax

Gradients = dict[str, Array]
Linear = Callable[[str, Array], Array]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _gelu_slope(x: Array) -> Array:
    return (1 + erf(x / math.sqrt(2))) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Array) -> Array:
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


SLOPES: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "relu": lambda x: np.where(x > 0, x.dtype.type(1), x.dtype.type(0)),
    "leaky_relu": lambda x: np.where(x > 0, x.dtype.type(1), x.dtype.type(0.01)),
}


def loss_and_gradients(
    model: NumpyModel, tokens_BT1: Tokens, experts_LNK: NDArray[np.int64] | None = None
) -> tuple[float, Gradients]:
    """Return mean cross entropy (nats per token) plus auxiliary terms, and its gradient by every parameter.

    Tokens (B, T + 1); `experts_LNK` replaces the routers' choices.
    """
    trace = model(tokens_BT1[:, :-1], experts_LNK)
    return _Backward(model, trace).run(tokens_BT1)


def adamw_step(
    model: NumpyModel,
    gradients: Gradients,
    second_moments: Gradients,
    optimizer: OptimizerConfig,
    step: int,
    rate: float,
) -> tuple[Gradients, Gradients]:
    """Return (weights, first moments) after one step of AdamW (Loshchilov & Hutter 2019) from first moments of 0.

    Gradients are clipped by their global norm; `step` counts from 1.
    """
    beta1, beta2 = optimizer.betas
    kind = model.dtype
    norm = math.sqrt(sum(float(np.square(gradient.astype(np.float64)).sum()) for gradient in gradients.values()))
    clip = kind(min(1.0, optimizer.max_grad_norm / (norm + 1e-6)))
    weights, means = {}, {}
    for group in optimizer_groups(model.config, optimizer):
        for name in group.names:
            gradient, weight = clip * gradients[name], model.weights[name]
            mean = kind(1 - beta1) * gradient
            square = kind(beta2) * second_moments[name].astype(kind) + kind(1 - beta2) * gradient * gradient
            direction = (mean / kind(1 - beta1**step)) / (np.sqrt(square / kind(1 - beta2**step)) + kind(optimizer.eps))
            weights[name] = weight * kind(1 - rate * group.weight_decay) - kind(rate) * direction
            means[name] = mean
    return weights, means


class _Backward:
    """Backward pass from the logits to the embeddings, through the recorded calls of one forward pass."""

    def __init__(self, model: NumpyModel, trace: ForwardTrace):
        self._model, self._config, self._weights = model, model.config, model.weights
        self._trace, self._calls = trace, trace.calls
        shapes = {parameter.name: parameter.shape for parameter in parameter_table(model.config)}
        self._gradients = {name: np.zeros(shape, model.dtype) for name, shape in shapes.items()}
        self._auxiliary = 0.0

    def run(self, tokens_BT1: Tokens) -> tuple[float, Gradients]:
        config, tokens_BT, targets_BT = self._config, tokens_BT1[:, :-1], tokens_BT1[:, 1:]
        probabilities_BTV = softmax(self._trace.logits_BTV)
        chosen_BT = np.take_along_axis(probabilities_BTV, targets_BT[..., None], axis=-1)
        loss = float(-np.log(chosen_BT).mean())
        np.put_along_axis(probabilities_BTV, targets_BT[..., None], chosen_BT - 1, axis=-1)
        dx_BTD = self._linear("lm_head", probabilities_BTV / probabilities_BTV.dtype.type(tokens_BT.size))
        dx_BTD = self._norm("norm", dx_BTD)
        for layer in reversed(range(config.n_layers)):
            block = f"layers.{layer}"
            for sublayer, norm in (("mlp", "post_attention_layernorm"), ("self_attn", "input_layernorm")):
                if config.norm_position == "pre":
                    dx_BTD = dx_BTD + self._norm(f"{block}.{norm}", self._sublayer(f"{block}.{sublayer}", dx_BTD))
                else:
                    dx_BTD = self._norm(f"{block}.{norm}", dx_BTD)
                    dx_BTD = dx_BTD + self._sublayer(f"{block}.{sublayer}", dx_BTD)
        np.add.at(self._gradients["embed_tokens.weight"], tokens_BT, dx_BTD)
        if config.position_encoding == "learned_absolute":
            self._gradients["embed_positions.weight"][: tokens_BT.shape[1]] += dx_BTD.sum(axis=0)
        return loss + self._auxiliary, self._gradients

    def _sublayer(self, name: str, dy_BTD: Array) -> Array:
        if name.endswith("self_attn"):
            return self._attention(name, dy_BTD)
        if layer_of(name) in self._config.expert_layers:
            return self._moe(name, dy_BTD)
        return self._ffn(name, dy_BTD)

    def _ffn(self, name: str, dy: Array) -> Array:
        outputs = {part: self._calls[f"{name}.{part}"].output for part in self._projections()}
        return self._hidden(name, dy, outputs, self._linear)

    def _linear(self, name: str, dy: Array) -> Array:
        tied = name == "lm_head" and self._config.weight_tying
        weight = "embed_tokens.weight" if tied else f"{name}.weight"
        x = self._calls[name].inputs[0]
        rows = dy.reshape(-1, dy.shape[-1])
        self._gradients[weight] += rows.T @ x.reshape(-1, x.shape[-1])
        if f"{name}.bias" in self._gradients:
            self._gradients[f"{name}.bias"] += rows.sum(axis=0)
        return dy @ self._weights[weight]

    def _norm(self, name: str, dy: Array) -> Array:
        x, weight = self._calls[name].inputs[0], self._weights[f"{name}.weight"]
        centred = self._config.normalization != "rmsnorm" and not name.endswith(("q_norm", "k_norm"))
        x = x - x.mean(-1, keepdims=True) if centred else x
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(self._config.norm_eps))
        x = x / scale
        self._gradients[f"{name}.weight"] += (dy * x).reshape(-1, x.shape[-1]).sum(axis=0)
        if f"{name}.bias" in self._gradients:
            self._gradients[f"{name}.bias"] += dy.reshape(-1, x.shape[-1]).sum(axis=0)
        dy = dy * weight
        dx: Array = (dy - x * (dy * x).mean(-1, keepdims=True)) / scale
        return dx - dx.mean(-1, keepdims=True) if centred else dx

    def _attention(self, name: str, dy_BTD: Array) -> Array:
        config, (n_batch, n_time, _) = self._config, dy_BTD.shape

        def heads(x_BTC: Array) -> Array:
            return x_BTC.reshape(n_batch, n_time, -1, config.head_dim).swapaxes(1, 2)

        q_BHTd, k_BGTd, v_BGTd = (heads(self._calls[f"{name}.{letter}_proj"].output) for letter in "qkv")
        if config.qk_norm:
            q_BHTd, k_BGTd = (self._calls[f"{name}.{letter}_norm"].output for letter in "qk")
        if config.position_encoding == "rope":
            q_BHTd, k_BGTd = self._model.rotate(q_BHTd), self._model.rotate(k_BGTd)
        do_BHTd = heads(self._linear(f"{name}.o_proj", dy_BTD))
        dq_BHTd, dk_BGTd, dv_BGTd = np.empty_like(q_BHTd), np.zeros_like(k_BGTd), np.zeros_like(v_BGTd)
        scale = q_BHTd.dtype.type(1 / math.sqrt(config.head_dim))
        for head in range(config.n_heads):
            group = head * config.n_kv_heads // config.n_heads
            scores_BTT = q_BHTd[:, head] @ k_BGTd[:, group].swapaxes(-1, -2) * scale
            weights_BTT = softmax(np.where(np.tri(n_time, dtype=bool), scores_BTT, scores_BTT.dtype.type(-np.inf)))
            dv_BGTd[:, group] += weights_BTT.swapaxes(-1, -2) @ do_BHTd[:, head]
            dweights_BTT = do_BHTd[:, head] @ v_BGTd[:, group].swapaxes(-1, -2)
            dscores_BTT = _softmax_back(weights_BTT, dweights_BTT) * scale
            dq_BHTd[:, head] = dscores_BTT @ k_BGTd[:, group]
            dk_BGTd[:, group] += dscores_BTT.swapaxes(-1, -2) @ q_BHTd[:, head]
        if config.position_encoding == "rope":
            dq_BHTd, dk_BGTd = self._model.rotate(dq_BHTd, back=True), self._model.rotate(dk_BGTd, back=True)
        if config.qk_norm:
            dq_BHTd, dk_BGTd = self._norm(f"{name}.q_norm", dq_BHTd), self._norm(f"{name}.k_norm", dk_BGTd)
        dx_BTD = np.zeros_like(dy_BTD)
        for letter, dx in zip("qkv", (dq_BHTd, dk_BGTd, dv_BGTd), strict=True):
            dx_BTD += self._linear(f"{name}.{letter}_proj", dx.swapaxes(1, 2).reshape(n_batch, n_time, -1))
        return dx_BTD

    def _projections(self) -> tuple[str, ...]:
        return ("up_proj", "gate_proj") if self._config.ffn_type == "swiglu" else ("up_proj",)

    def _hidden(self, name: str, dy: Array, outputs: dict[str, Array], linear: Linear) -> Array:
        activation, dhidden = self._config.activation, linear(f"{name}.down_proj", dy)
        up = outputs["up_proj"]
        if self._config.ffn_type != "swiglu":
            return linear(f"{name}.up_proj", dhidden * SLOPES[activation](up))
        gate = outputs["gate_proj"]
        dx_from_gate = linear(f"{name}.gate_proj", dhidden * up * SLOPES[activation](gate))
        return linear(f"{name}.up_proj", dhidden * ACTIVATIONS[activation](gate)) + dx_from_gate

    def _moe(self, name: str, dy_BTD: Array) -> Array:
        moe, (x_ND, experts_NK) = self._config.moe, self._calls[f"{name}.experts"].inputs
        assert moe is not None
        logits_NE, y_NKD = self._calls[f"{name}.router"].output, self._calls[f"{name}.experts"].output
        gates_NK = softmax(np.take_along_axis(logits_NE, experts_NK, axis=-1))
        dy_ND = dy_BTD.reshape(x_ND.shape)
        dlogits_NE = np.zeros_like(logits_NE)
        dgates_NK = np.einsum("nd,nkd->nk", dy_ND, y_NKD)
        np.put_along_axis(dlogits_NE, experts_NK, _softmax_back(gates_NK, dgates_NK), axis=-1)
        dx_ND = self._linear(f"{name}.router", dlogits_NE + self._auxiliary_slope(logits_NE, experts_NK))
        for expert in range(moe.n_experts):
            tokens, places = np.nonzero(experts_NK == expert)
            dy = dy_ND[tokens] * gates_NK[tokens, places, None]
            np.add.at(dx_ND, tokens, self._expert(f"{name}.experts", expert, x_ND[tokens], dy))
        if moe.shared_d_ff:
            dx_ND += self._ffn(f"{name}.shared_expert", dy_ND)
        return dx_ND.reshape(dy_BTD.shape)

    def _expert(self, name: str, expert: int, x: Array, dy: Array) -> Array:
        inputs = {f"{name}.{part}": x for part in self._projections()}
        outputs = {}
        for part in self._projections():
            outputs[part] = x @ self._weights[f"{name}.{part}.weight"][expert].T
            if f"{name}.{part}.bias" in self._weights:
                outputs[part] = outputs[part] + self._weights[f"{name}.{part}.bias"][expert]
        activated = ACTIVATIONS[self._config.activation](outputs[self._projections()[-1]])
        inputs[f"{name}.down_proj"] = activated * outputs["up_proj"] if len(outputs) == 2 else activated

        def linear(part: str, dy: Array) -> Array:
            self._gradients[f"{part}.weight"][expert] += dy.T @ inputs[part]
            if f"{part}.bias" in self._gradients:
                self._gradients[f"{part}.bias"][expert] += dy.sum(axis=0)
            return dy @ self._weights[f"{part}.weight"][expert]

        return self._hidden(name, dy, outputs, linear)

    def _auxiliary_slope(self, logits_NE: Array, experts_NK: Array) -> Array:
        """Return the gradient of α·E·Σ fᵢPᵢ + β·mean(logsumexp²) by the router logits, and add its value to the loss.

        The load fᵢ carries no gradient.
        """
        moe, n_tokens = self._config.moe, len(logits_NE)
        assert moe is not None
        load_E = (np.bincount(experts_NK.ravel(), minlength=moe.n_experts) / experts_NK.size).astype(logits_NE.dtype)
        probabilities_NE = softmax(logits_NE)
        largest_N = logits_NE.max(axis=-1)
        logsumexp_N = largest_N + np.log(np.exp(logits_NE - largest_N[:, None]).sum(axis=-1))
        alpha, beta = moe.load_balance_coefficient * moe.n_experts, moe.z_loss_coefficient
        self._auxiliary += float(
            alpha * (load_E * probabilities_NE.mean(axis=0)).sum() + beta * np.square(logsumexp_N).mean()
        )
        balance_NE = alpha * _softmax_back(probabilities_NE, np.broadcast_to(load_E, logits_NE.shape))
        slope: Array = (balance_NE + 2 * beta * logsumexp_N[:, None] * probabilities_NE) / n_tokens
        return slope


def _softmax_back(weights: Array, dweights: Array) -> Array:
    dx: Array = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    return dx
