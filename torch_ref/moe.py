"""Mixtures of experts: routing, dispatch, and what keeps the load balanced.

B batch, T time, N tokens (B·T), D model, F ffn, E experts, K experts per token, A assignments (N·K).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_moe.config import LoRAConfig, ModelConfig, MoEConfig
from mlx_moe.parameters import FFN_INPUTS
from torch_ref.layers import ACTIVATIONS, FFN, FFN_TYPES, Linear


class Routing(NamedTuple):
    """The routing of one layer: float32 logits (N, E), expert indices (N, K) by falling logit."""

    logits_NE: Tensor
    experts_NK: Tensor


def choose_experts(router_logits_NE: Tensor, k: int) -> Tensor:
    """Choose the top-k experts of each token (N, K), by falling logit, ties to the lower index."""
    # topk leaves the order of equals open; a stable sort keeps the lower index first.
    return router_logits_NE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]


def gate_weights(router_logits_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """Return the weights of the chosen experts, (N, K) float32: the softmax over their logits."""
    return router_logits_NE.gather(-1, experts_NK).softmax(dim=-1)


def expert_load(routing: Routing) -> Tensor:
    """Return the share of assignments that each expert takes, (E,) float32; sums to 1."""
    experts_NK, n_experts = routing.experts_NK, routing.logits_NE.shape[-1]
    return F.one_hot(experts_NK, n_experts).float().mean(dim=(0, 1))


def expert_loads(routings: Sequence[Routing]) -> Tensor:
    """Return the load of each of L layers, (L, E) float32."""
    return torch.stack([expert_load(routing) for routing in routings])


def router_entropy(routing: Routing) -> Tensor:
    """Return the mean router entropy per token (nats), (); ln(E) when the router is uniform."""
    log_probability_NE = routing.logits_NE.log_softmax(dim=-1)
    return -(log_probability_NE.exp() * log_probability_NE).sum(dim=-1).mean()


def auxiliary_loss(routing: Routing, load_E: Tensor, config: MoEConfig) -> Tensor:
    """Return α·E·Σ fᵢPᵢ (Switch, Fedus et al. 2021) + β·mean(logsumexp²) (ST-MoE, Zoph et al. 2022) of one layer, ().

    fᵢ is `load_E`, the load over the whole batch; `routing` may be that of a part.
    """
    mean_probability_E = routing.logits_NE.softmax(dim=-1).mean(dim=0)
    balance = config.n_experts * (load_E * mean_probability_E).sum()
    z_loss = routing.logits_NE.logsumexp(dim=-1).square().mean()
    return config.load_balance_coefficient * balance + config.z_loss_coefficient * z_loss


class ExpertLinear(nn.Module):
    """E linear maps side by side: weight (E, out, in), bias (E, out); adapters A (E, rank, in), B (E, out, rank)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int, bias: bool, adapter: LoRAConfig | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_experts, n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_experts, n_out)) if bias else None
        self._scale = adapter.alpha / adapter.rank if adapter else 0.0
        if adapter:
            self.lora_a = nn.Parameter(torch.zeros(n_experts, adapter.rank, n_in))
            self.lora_b = nn.Parameter(torch.zeros(n_experts, n_out, adapter.rank))
        self._one_by_one, self._grouped_mm = _one_by_one, F.grouped_mm

    def stay_out_of_graphs(self) -> None:
        """Keep products out of torch.compile, which traces `grouped_mm` in bfloat16 only (PyTorch 2.13)."""
        self._one_by_one, self._grouped_mm = _uncompiled(_one_by_one), _uncompiled(F.grouped_mm)

    def forward(self, x_AC: Tensor, expert_A: Tensor, end_E: Tensor) -> Tensor:
        """Multiply rows (A, in), sorted by expert; the rows of expert e end before `end_E[e]`."""
        y_AC = self._products(x_AC, self.weight, self.bias, expert_A, end_E)
        if not self._scale:
            return y_AC
        low_AR = self._products(x_AC, self.lora_a, None, expert_A, end_E)
        return y_AC + self._scale * self._products(low_AR, self.lora_b, None, expert_A, end_E)

    def _products(self, x_AC: Tensor, weight: Tensor, bias: Tensor | None, expert_A: Tensor, end_E: Tensor) -> Tensor:
        weight = weight.to(x_AC.dtype)
        bias = None if bias is None else bias.to(x_AC.dtype)
        # grouped_mm takes rows of whole 16 bytes only; without it, a GPU has to wait for the host to read the ends.
        is_whole = not any(n * x_AC.itemsize % 16 for n in weight.shape[1:])
        if x_AC.device.type == "cpu" or not is_whole:
            return self._one_by_one(x_AC, weight, bias, end_E)
        grouped_mm = F.grouped_mm if x_AC.dtype is torch.bfloat16 else self._grouped_mm
        y_AC = grouped_mm(x_AC, weight.transpose(-1, -2), offs=end_E)
        # A product, and not an index, because its gradient is summed in the same order every time.
        return y_AC if bias is None else y_AC + F.one_hot(expert_A, len(bias)).to(x_AC.dtype) @ bias


_uncompiled = cache(torch.compiler.disable)  # the same function for all layers, so that they share their code


def _one_by_one(x_AC: Tensor, weight: Tensor, bias: Tensor | None, end_E: Tensor) -> Tensor:
    y_AC: Tensor = _ExpertProducts.apply(x_AC, weight, bias, end_E[:-1].tolist())
    return y_AC


class _ExpertProducts(torch.autograd.Function):
    """A product for each expert, with its bias, written in place: it costs what a dense layer costs."""

    @staticmethod
    def forward(ctx: Any, x_AC: Tensor, weight: Tensor, bias: Tensor | None, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_AC, weight)
        ctx.ends, ctx.has_bias = ends, bias is not None
        y_AC = x_AC.new_empty(len(x_AC), weight.shape[1])
        for e, (x, y) in enumerate(zip(x_AC.tensor_split(ends), y_AC.tensor_split(ends), strict=True)):
            if bias is None:
                torch.mm(x, weight[e].mT, out=y)
            else:
                torch.addmm(bias[e], x, weight[e].mT, out=y)
        return y_AC

    @staticmethod
    def backward(ctx: Any, grad_y_AC: Tensor) -> tuple[Tensor | None, ...]:
        x_AC, weight = ctx.saved_tensors
        grad_y_AC = grad_y_AC.contiguous()
        grad_x_AC = torch.empty_like(x_AC)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # frozen ones need none
        grad_bias = weight.new_empty(weight.shape[:2]) if ctx.has_bias and ctx.needs_input_grad[2] else None
        rows = (tensor.tensor_split(ctx.ends) for tensor in (grad_y_AC, x_AC, grad_x_AC))
        for e, (grad_y, x, grad_x) in enumerate(zip(*rows, strict=True)):
            torch.mm(grad_y, weight[e], out=grad_x)
            if grad_weight is not None:
                torch.mm(grad_y.mT, x, out=grad_weight[e])
            if grad_bias is not None:
                torch.sum(grad_y, dim=0, out=grad_bias[e])
        return grad_x_AC, grad_weight, grad_bias, None


class Experts(nn.Module):
    """All experts of a layer; their weights are (E, out, in)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        n_experts, d_model, d_ff = moe.n_experts, config.d_model, config.expert_d_ff
        for name in FFN_INPUTS[config.ffn_type]:
            self.add_module(name, ExpertLinear(n_experts, d_model, d_ff, config.bias, config.adapter(name)))
        self.down_proj = ExpertLinear(n_experts, d_ff, d_model, config.bias, config.adapter("down_proj"))
        self._combine = FFN_TYPES[config.ffn_type]
        self._activate = ACTIVATIONS[config.activation]

    def forward(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor | None = None) -> Tensor:
        """Return the chosen experts' outputs, (N, K, D); with gates, their weighted sum, (N, D)."""
        expert_A, order_A = experts_NK.flatten().sort(stable=True)
        experts_E = torch.arange(self.down_proj.weight.shape[0], device=x_ND.device)
        end_E = torch.searchsorted(expert_A, experts_E, right=True).int()
        place_NK = order_A.argsort().view(experts_NK.shape)
        x_AD = _dispatched(x_ND, order_A, place_NK)
        hidden_AF = self._combine(lambda name: getattr(self, name)(x_AD, expert_A, end_E), self._activate)
        y_AD = self.down_proj(hidden_AF, expert_A, end_E)
        return y_AD[place_NK] if gates_NK is None else _combined(y_AD, gates_NK, order_A, place_NK)


# Rows to and from their experts: row a is that of assignment order_A[a], whose token is order_A[a] // K, and token n's
# rows are place_NK[n]. Either way, a bag of K rows is summed as it is read: a CPU adds scattered rows in one thread.


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, order_A // place_NK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_x_AD: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        return F.embedding_bag(place_NK, grad_x_AD, mode="sum"), None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, gates_NK: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_AD, gates_NK, order_A, place_NK)
        return F.embedding_bag(place_NK, y_AD, per_sample_weights=gates_NK.to(y_AD.dtype), mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_y_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_AD, gates_NK, order_A, place_NK = ctx.saved_tensors
        grad_row_AD = grad_y_ND.index_select(0, order_A // place_NK.shape[1])
        grad_gate_A = torch.linalg.vecdot(grad_row_AD, y_AD).to(gates_NK.dtype)
        gate_A = gates_NK.flatten()[order_A].to(y_AD.dtype)
        return grad_row_AD * gate_A[:, None], grad_gate_A[place_NK], None, None


def _dispatched(x_ND: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
    x_AD: Tensor = _Dispatched.apply(x_ND, order_A, place_NK)
    return x_AD


def _combined(y_AD: Tensor, gates_NK: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
    y_ND: Tensor = _Combined.apply(y_AD, gates_NK, order_A, place_NK)
    return y_ND


class MoE(nn.Module):
    """A mixture of experts, and a shared one if the config has it. No token is dropped."""

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        self.router = Linear(config.d_model, moe.n_experts, bias=False)
        self.experts = Experts(config, moe)
        self.shared_expert = FFN(config, moe.shared_d_ff) if moe.shared_d_ff else None
        self._top_k = moe.top_k

    def forward(self, x_BTD: Tensor, experts_NK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Return the output (B, T, D) and the routing. `experts_NK` replaces the router's choice, not its gates."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.router(x_ND.float())
        if experts_NK is None:
            experts_NK = choose_experts(logits_NE, self._top_k)
        gates_NK = gate_weights(logits_NE, experts_NK)
        y_ND = self.experts(x_ND, experts_NK, gates_NK)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert(x_ND)
        return y_ND.view(x_BTD.shape), Routing(logits_NE, experts_NK)
