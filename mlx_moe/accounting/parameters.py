"""Parameter counts: total and active per token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Axis, Parameter, layer_of, parameter_table


@dataclass(frozen=True)
class ParameterCount:
    """Parameter counts of a model.

    `inactive`: parameters of the experts that a token does not visit; `idle_experts`: their number over all layers.
    """

    total: int
    active: int
    idle_experts: int

    @property
    def inactive(self) -> int:
        return self.total - self.active

    @property
    def efficiency(self) -> float:
        """Share of the parameters that are active for a token, 0 to 1."""
        return self.active / self.total

    def to_json(self) -> dict[str, int | float]:
        return {
            "total": self.total,
            "active_per_token": self.active,
            "inactive": self.inactive,
            "idle_experts": self.idle_experts,
            "efficiency_percent": round(100 * self.efficiency, 1),
        }


def counted_table(config: ModelConfig) -> list[tuple[Parameter, int]]:
    """Return the parameter table with one layer of each kind (dense, experts), and how often each tensor occurs.

    All layers of a kind are alike, so the cost does not grow with the number of layers.
    """
    n_mixtures = len(config.expert_layers)
    layers = [number for number in (config.n_layers - n_mixtures, n_mixtures) if number]
    moe = config.moe and config.moe.model_copy(update={"layers": (1,) if len(layers) == 2 else None})
    short = config.model_copy(update={"n_layers": len(layers), "moe": moe})
    rows = [(parameter, layer_of(parameter.name)) for parameter in parameter_table(short)]
    return [(parameter, 1 if layer is None else layers[layer]) for parameter, layer in rows]


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count all parameters by part.

    `embeddings` (tokens and positions), `attention`, `router`, `ffn` (all experts), `norms`, and `head`, 0 if tied.
    """
    parts = dict.fromkeys(("embeddings", "attention", "router", "ffn", "norms", "head"), 0)
    for parameter, number in counted_table(config):
        parts[_part(parameter.name)] += number * math.prod(parameter.shape)
    return parts


def non_embedding_parameters(config: ModelConfig) -> int:
    """Return N of Kaplan et al. 2020: active parameters without embeddings and head."""
    parts = parameters_by_part(config)
    return count_parameters(config).active - parts["embeddings"] - parts["head"]


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count every tensor of the model; a token visits `top_k` of the `n_experts` in each expert layer."""
    total = inactive = 0
    idle_per_layer = config.moe.n_experts - config.moe.top_k if config.moe else 0
    for parameter, number in counted_table(config):
        size = number * math.prod(parameter.shape)
        total += size
        if config.moe and Axis.EXPERT in parameter.axes and "experts" in parameter.name:
            inactive += size // config.moe.n_experts * idle_per_layer
    return ParameterCount(total, total - inactive, idle_per_layer * len(config.expert_layers))


def _part(name: str) -> str:
    for word, part in (("embed", "embeddings"), ("lm_head", "head"), ("norm", "norms"), ("self_attn", "attention")):
        if word in name:
            return part
    return "router" if ".router." in name else "ffn"
