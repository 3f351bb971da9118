"""Upcycling: a dense model becomes a mixture of experts that computes the same function.

Every expert is a copy of the dense FFN, or a part of one (granular experts), so the gated sum equals the dense output
under any router (Komatsuzaki et al. 2022; He et al. 2024); a shared expert takes half of the output (DeepSeekMoE, Dai
et al. 2024). Noise and Drop-Upcycling (Nakamura et al. 2025) are lossy options. docs/mathematics.md derives the scales
of weights and moments; docs/guides/optimizer-transfer.md measures the moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlx_moe.config import ModelConfig, MoEConfig, UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Axis, Parameter, layer_of, normal, parameter_table
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.expert_noise import ExpertNoise
from mlx_moe.transfer.moe_layout import experts_of, segments_of
from mlx_moe.transfer.plan import AxisMap, Pad, Plan, TensorPlan, fresh_tensor

ZERO_ROUTER_WARNING = (
    "router_init zero: all router logits tie, so every token goes to the first top_k experts, which get identical "
    "updates; the router's gradient from the task is exactly 0 and the model stays dense. Take router_init random, "
    "which is just as exact at the boundary"
)

LOSSY_METHOD = "noise and drop change the model on purpose; see the figures above"


def plan_upcycling(
    config: ModelConfig,
    moe: MoEConfig,
    router_init: Literal["random", "zero", "centroids"] = "random",
    router_std: float = 0.02,
    seed: int = 0,
    noise: float = 0.0,
    drop: float = 0.0,
    routers: Routers | None = None,
) -> Plan:
    """Return the plan from a dense model to experts that copy its FFN, or parts of it.

    If `moe.d_ff` is 1/G of the model's, the experts are the parts of n_experts / G copies. With `noise` (a standard
    deviation, relative to each tensor's) or `drop` (the share of neurons that each expert redraws, the same ones in all
    its projections) experts differ, and the plan is lossy; a shared expert stays a copy. The router is normal with
    standard deviation `router_std`, or zero (see ZERO_ROUTER_WARNING), or has the rows of `routers`, one for each copy.

    Raises InputError if the model has experts already, or `moe` is no upcycling of it.
    """
    if config.moe is not None:
        raise InputError(f"the model has {config.moe.n_experts} experts already; upcycle a dense one")
    target = config.model_copy(update={"moe": moe})
    upcycling = _Upcycling(
        moe,
        n_parts=segments_of(config, moe),
        dense={parameter.name for parameter in parameter_table(config)},
        router_std=router_std if router_init == "random" else 0.0,
        seed=seed,
        routers=routers or {},
    )
    tensors = [upcycling.tensor(parameter) for parameter in parameter_table(target)]
    if noise or drop:
        tensors = [
            replace(tensor, draw=_draw(parameter, target.expert_d_ff, noise, drop, seed)) if tensor.new_axis else tensor
            for parameter, tensor in zip(parameter_table(target), tensors, strict=True)
        ]
    return Plan(config, target, tuple(tensors), "upcycle")


def plan_phase(config: ModelConfig, phase: UpcyclePhaseConfig, seed: int, routers: Routers | None = None) -> Plan:
    """Return the plan from a dense model to a phase's experts; `routers` are the centroids, if the phase uses them."""
    moe = experts_of(config, phase)
    return plan_upcycling(config, moe, phase.router_init, phase.router_std, seed, phase.noise, phase.drop, routers)


@dataclass(frozen=True)
class _Upcycling:
    moe: MoEConfig
    n_parts: int
    dense: set[str]  # names of the source's tensors
    router_std: float
    seed: int
    routers: Routers

    def tensor(self, parameter: Parameter) -> TensorPlan:
        if parameter.name in self.dense:
            return TensorPlan(parameter.name, parameter.shape, source=parameter.name)
        if parameter.axes == (Axis.EXPERT, Axis.RESIDUAL_READ):
            return self.router(parameter)
        return self.shared(parameter) if ".shared_expert." in parameter.name else self.experts(parameter)

    def router(self, parameter: Parameter) -> TensorPlan:
        """Plan a router: a row per copy, repeated for its parts."""
        n_experts, d_model = parameter.shape
        n_copies = n_experts // self.n_parts
        kind: Literal["constant", "normal"] = "normal" if self.router_std else "constant"
        rows = fresh_tensor(parameter.name, (n_copies, d_model), kind, self.router_std, self.seed)
        layer = layer_of(parameter.name)
        given = None if layer is None else self.routers.get(layer)
        if given is not None:
            rows = replace(rows, pads=(Pad(0, n_copies, "given", values=given),))
        if self.n_parts == 1:
            return rows
        repeated = AxisMap(axis=0, index=np.arange(n_experts) // self.n_parts)
        return replace(rows, shape=parameter.shape, maps=(repeated,))

    def experts(self, parameter: Parameter) -> TensorPlan:
        """Plan the experts: every part of every copy."""
        n_experts, top_k = self.moe.n_experts, self.moe.top_k
        neurons = _neurons(parameter)
        parts = self.n_parts if neurons else 1
        scale, gradient = 1.0, self.share * self.n_parts
        if self.writes(parameter):
            scale, gradient = self.share * parts, 1.0
        copies = AxisMap(
            axis=0,
            index=np.arange(n_experts) % parts,
            scale=None if scale == 1 else np.full(n_experts, scale),
            gradient=(
                np.full(n_experts, gradient / n_experts),
                np.full(n_experts, gradient**2 / (n_experts * top_k)),
            ),
        )
        return TensorPlan(
            parameter.name,
            parameter.shape,
            parameter.name.replace(".experts.", "."),
            new_axis=True,
            cut_axis=neurons[0] if neurons else 0,
            n_parts=parts,
            maps=(copies,),
        )

    def shared(self, parameter: Parameter) -> TensorPlan:
        """Plan a shared expert: a copy, with its share of the output."""
        rows, share = np.ones(parameter.shape[0]), self.share
        scale, gradient = (share * rows, rows) if self.writes(parameter) else (None, share * rows)
        copy = AxisMap(0, np.arange(len(rows)), scale, (gradient, gradient**2))
        source = parameter.name.replace(".shared_expert.", ".")
        return TensorPlan(parameter.name, parameter.shape, source, maps=(copy,))

    @property
    def share(self) -> float:
        """The fraction of the dense output that routed experts write, and equally a shared one."""
        return 0.5 if self.moe.shared_d_ff else 1.0

    @staticmethod
    def writes(parameter: Parameter) -> bool:
        """Return whether the tensor writes to the residual stream."""
        return Axis.RESIDUAL_WRITE in parameter.axes


def _draw(parameter: Parameter, d_ff: int, noise: float, drop: float, seed: int) -> ExpertNoise:
    block = parameter.name.partition(".experts.")[0]
    n_experts, n_dropped = parameter.shape[0], round(drop * d_ff)
    dropped_EN = np.argsort(normal(f"{block} dropped", seed, (n_experts, d_ff)))[:, :n_dropped]
    neurons = _neurons(parameter)
    return ExpertNoise(parameter.name, seed, noise, dropped_EN if neurons else dropped_EN[:, :0], *(neurons or [0]))


def _neurons(parameter: Parameter) -> list[int]:
    """Return the axis of an expert's tensor that runs over its neurons; none for the output bias."""
    return [axis for axis, kind in enumerate(parameter.axes[1:]) if kind in (Axis.FFN_WRITE, Axis.FFN_READ)]
