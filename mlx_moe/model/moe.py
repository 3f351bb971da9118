"""Mixtures of experts: routing, dispatch, and the loss that balances the load.

B batch, T time, N tokens (B·T), D model, F ffn, E experts, K experts per token, A assignments (N·K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_moe.config import LoRAConfig, ModelConfig, MoEConfig
from mlx_moe.kernel_sizes import MLX_EXPERT_ROWS
from mlx_moe.model.cpu.experts import dispatch_padded
from mlx_moe.model.functional import expert_products, on_cpu
from mlx_moe.model.layers import ACTIVATIONS, FFN, FFN_TYPES
from mlx_moe.parameters import FFN_INPUTS


class Routing(NamedTuple):
    """The routing of one layer: float32 logits (N, E), expert indices (N, K) by falling logit."""

    logits_NE: mx.array
    experts_NK: mx.array


def choose_experts(router_logits_NE: mx.array, k: int) -> mx.array:
    """Choose the top-k experts of each token (N, K), by falling logit, ties to the lower index."""
    remaining_NE = mx.stop_gradient(router_logits_NE)
    chosen = []
    for _ in range(k):  # argmax takes the first of equals, which sorting need not
        best_N1 = mx.argmax(remaining_NE, axis=-1, keepdims=True)
        chosen.append(best_N1)
        remaining_NE = mx.put_along_axis(remaining_NE, best_N1, mx.array(-mx.inf), axis=-1)
    return mx.concatenate(chosen, axis=-1).astype(mx.int32)


def gate_weights(router_logits_NE: mx.array, experts_NK: mx.array) -> mx.array:
    """Return the weights of the chosen experts, (N, K) float32: the softmax over their logits."""
    return mx.softmax(mx.take_along_axis(router_logits_NE, experts_NK, axis=-1), axis=-1)


def expert_load(routing: Routing) -> mx.array:
    """Return the share of assignments that each expert takes, (E,) float32; sums to 1."""
    experts_NK, n_experts = routing.experts_NK, routing.logits_NE.shape[-1]
    return (experts_NK[..., None] == mx.arange(n_experts)).astype(mx.float32).mean(axis=(0, 1))


def expert_loads(routings: Sequence[Routing]) -> mx.array:
    """Return the load of each of L layers, (L, E) float32."""
    return mx.stack([expert_load(routing) for routing in routings])


def router_entropy(routing: Routing) -> mx.array:
    """Return the mean router entropy per token (nats), (); ln(E) when the router is uniform."""
    log_probability_NE = routing.logits_NE - mx.logsumexp(routing.logits_NE, axis=-1, keepdims=True)
    return -(mx.exp(log_probability_NE) * log_probability_NE).sum(axis=-1).mean()


def auxiliary_loss(routing: Routing, load_E: mx.array, config: MoEConfig) -> mx.array:
    """Return α·E·Σ fᵢPᵢ (Switch, Fedus et al. 2021) + β·mean(logsumexp²) (ST-MoE, Zoph et al. 2022) of one layer, ().

    fᵢ is `load_E`, the load over the whole batch; `routing` may be that of a part.
    """
    mean_probability_E = mx.softmax(routing.logits_NE, axis=-1).mean(axis=0)
    balance = config.n_experts * (load_E * mean_probability_E).sum()
    z_loss = mx.square(mx.logsumexp(routing.logits_NE, axis=-1)).mean()
    return config.load_balance_coefficient * balance + config.z_loss_coefficient * z_loss


class ExpertLinear(nn.Module):
    """E linear maps side by side: weight (E, out, in), bias (E, out); adapters A (E, rank, in), B (E, out, rank)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int, bias: bool, adapter: LoRAConfig | None = None):
        super().__init__()
        self.weight = mx.zeros((n_experts, n_out, n_in))
        if bias:
            self.bias = mx.zeros((n_experts, n_out))
        self._scale = adapter.alpha / adapter.rank if adapter else 0.0
        if adapter:
            self.lora_a = mx.zeros((n_experts, adapter.rank, n_in))
            self.lora_b = mx.zeros((n_experts, n_out, adapter.rank))

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        """Multiply x (M, rows, in) by one expert for each of the M groups of rows, in rising order."""
        y = expert_products(x, self.weight, expert)
        if "bias" in self:
            y = y + self.bias.astype(x.dtype)[expert][:, None]
        if self._scale:
            y = y + self._scale * expert_products(expert_products(x, self.lora_a, expert), self.lora_b, expert)
        return y


class Experts(nn.Module):
    """All experts of a layer; their weights are (E, out, in)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        n_experts, d_model, d_ff = moe.n_experts, config.d_model, config.expert_d_ff
        for name in FFN_INPUTS[config.ffn_type]:
            self[name] = ExpertLinear(n_experts, d_model, d_ff, config.bias, config.adapter(name))
        self.down_proj = ExpertLinear(n_experts, d_ff, d_model, config.bias, config.adapter("down_proj"))
        self._combine = FFN_TYPES[config.ffn_type]
        self._activate = ACTIVATIONS[config.activation]

    def __call__(self, x_ND: mx.array, experts_NK: mx.array) -> mx.array:
        """Return the chosen experts' outputs, (N, K, D)."""
        dispatch = dispatch_padded if on_cpu() and experts_NK.size > MLX_EXPERT_ROWS else dispatch_sorted
        return dispatch(self._ffn, x_ND, experts_NK, self.down_proj.weight.shape[0])

    def _ffn(self, x: mx.array, expert: mx.array) -> mx.array:
        hidden = self._combine(lambda name: self[name](x, expert), self._activate)
        return self.down_proj(hidden, expert)


class MoE(nn.Module):
    """A mixture of experts, and a shared one if the config has it. No token is dropped."""

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        self.router = nn.Linear(config.d_model, moe.n_experts, bias=False)
        self.experts = Experts(config, moe)
        if moe.shared_d_ff:
            self.shared_expert = FFN(config, moe.shared_d_ff)
        self._top_k = moe.top_k

    def __call__(self, x_BTD: mx.array, experts_NK: mx.array | None = None) -> tuple[mx.array, Routing]:
        """Return the output (B, T, D) and the routing. `experts_NK` replaces the router's choice, not its gates."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.router(x_ND.astype(mx.float32))
        if experts_NK is None:
            experts_NK = choose_experts(logits_NE, self._top_k)
        gates_NK = gate_weights(logits_NE, experts_NK)
        y_NKD = self.experts(x_ND, experts_NK)
        y_ND = (y_NKD * gates_NK[..., None].astype(y_NKD.dtype)).sum(axis=1)
        if "shared_expert" in self:
            y_ND = y_ND + self.shared_expert(x_ND)
        return y_ND.reshape(x_BTD.shape), Routing(logits_NE, experts_NK)


ExpertFFN = Callable[[mx.array, mx.array], mx.array]


def dispatch_sorted(ffn: ExpertFFN, x_ND: mx.array, experts_NK: mx.array, n_experts: int) -> mx.array:
    """Run the experts on one row for each assignment, sorted by expert: GPUs group the products. Returns (N, K, D)."""
    expert_A = experts_NK.flatten()
    order_A = mx.argsort(expert_A)
    x_A1D = x_ND[order_A // experts_NK.shape[1]][:, None]
    y_AD = ffn(x_A1D, expert_A[order_A])[:, 0]
    return y_AD[mx.argsort(order_A)].reshape(*experts_NK.shape, -1)
