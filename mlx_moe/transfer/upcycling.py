"""Upcycling: a dense model becomes a mixture of experts that computes the same function.

Copies. The gates sum to 1 and the experts are equal, so their weighted sum is the dense FFN under any router
(Komatsuzaki et al. 2022, Sparse Upcycling). Experts that are told apart, by noise or by neurons that start anew
(Drop-Upcycling, Nakamura et al. 2025: half of them), are not, and the model pays for it at first.

Granular experts. Each of E copies is cut into G experts of 1/G of its neurons, and a token visits G times as many, for
as many operations (He et al. 2024, Upcycling LLMs into Mixture of Experts: virtual groups). The G parts of a copy lie
side by side and have one router row in common. So they tie, and top-k, which takes ties in rising order, takes all of
them or none, also where copies tie; each has 1/G of its copy's gate, so that what they write must be G times as large.
The bias of what they write is the dense one's: G times 1/G of it.

A shared expert, a copy that every token visits (DeepSeekMoE, Dai et al. 2024), is added to the others. Then either side
writes one half.

Gradients. Those of E copies sum to the dense one, and squares follow the noise of the batch: m' = m / E and
v' = v / (K·E). docs/mathematics.md derives these, and the factors of granular and shared experts;
docs/guides/optimizer-transfer.md measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlx_moe.config import ModelConfig, MoEConfig, UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Axis, Parameter, normal, table
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.draws import Draw
from mlx_moe.transfer.experts import experts_of, segments_of
from mlx_moe.transfer.plan import AxisMap, Pad, Plan, TensorPlan, fresh_tensor

ZERO_ROUTER_WARNING = (
    "router_init zero: all router logits tie, so every token goes to the first top_k experts, which get identical "
    "updates; the router's gradient from the task is exactly 0 and the model stays dense. Take router_init random, "
    "which is just as exact at the boundary"
)

LOSSY_METHOD = "noise and drop change the model on purpose; the figures above say by how much"


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
    """The plan from a dense model to experts that are all copies of its FFN; or, where `moe.d_ff` is 1/G of its
    neurons, the parts of n_experts / G copies.

    With `noise` (a standard deviation, relative to that of each tensor) or with `drop` (the share of the neurons that
    each expert draws anew, the same ones in all its projections) they differ, and the plan is lossy; a shared expert
    stays a copy. The router is normal with standard deviation `router_std`, or zero (see ZERO_ROUTER_WARNING), or has
    the rows of `routers`, one for each copy.

    Raises InputError if the model has experts already, or `moe` is no upcycling of it.
    """
    if config.moe is not None:
        raise InputError(f"the model has {config.moe.n_experts} experts already; upcycle a dense one")
    target = config.model_copy(update={"moe": moe})
    upcycling = _Upcycling(
        moe,
        n_parts=segments_of(config, moe),
        dense={parameter.name for parameter in table(config)},
        router_std=router_std if router_init == "random" else 0.0,
        seed=seed,
        routers=routers or {},
    )
    tensors = [upcycling.tensor(parameter) for parameter in table(target)]
    if noise or drop:
        tensors = [
            replace(tensor, draw=_draw(parameter, target.expert_d_ff, noise, drop, seed)) if tensor.new_axis else tensor
            for parameter, tensor in zip(table(target), tensors, strict=True)
        ]
    return Plan(config, target, tuple(tensors), "upcycle")


def plan_phase(config: ModelConfig, phase: UpcyclePhaseConfig, seed: int, routers: Routers | None = None) -> Plan:
    """The plan from a dense model to the experts that a phase asks for; `routers` are the centroids, if it does."""
    moe = experts_of(config, phase)
    return plan_upcycling(config, moe, phase.router_init, phase.router_std, seed, phase.noise, phase.drop, routers)


@dataclass(frozen=True)
class _Upcycling:
    moe: MoEConfig
    n_parts: int
    dense: set[str]  # the source's tensors
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
        """A row for every copy, the same for its parts."""
        n_experts, d_model = parameter.shape
        n_copies = n_experts // self.n_parts
        kind: Literal["constant", "normal"] = "normal" if self.router_std else "constant"
        rows = fresh_tensor(parameter.name, (n_copies, d_model), kind, self.router_std, self.seed)
        given = self.routers.get(int(parameter.name.split(".")[1]))
        if given is not None:
            rows = replace(rows, pads=(Pad(0, n_copies, "given", values=given),))
        if self.n_parts == 1:
            return rows
        repeated = AxisMap(axis=0, index=np.arange(n_experts) // self.n_parts)
        return replace(rows, shape=parameter.shape, maps=(repeated,))

    def experts(self, parameter: Parameter) -> TensorPlan:
        """Every part of every copy."""
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
        """A copy, with its share of what both write."""
        rows, share = np.ones(parameter.shape[0]), self.share
        scale, gradient = (share * rows, rows) if self.writes(parameter) else (None, share * rows)
        copy = AxisMap(0, np.arange(len(rows)), scale, (gradient, gradient**2))
        source = parameter.name.replace(".shared_expert.", ".")
        return TensorPlan(parameter.name, parameter.shape, source, maps=(copy,))

    @property
    def share(self) -> float:
        """Of what the dense FFN wrote, that of the routed experts, and of a shared one."""
        return 0.5 if self.moe.shared_d_ff else 1.0

    @staticmethod
    def writes(parameter: Parameter) -> bool:
        """Whether the tensor writes the residual stream."""
        return Axis.RESIDUAL_WRITE in parameter.axes


def _draw(parameter: Parameter, d_ff: int, noise: float, drop: float, seed: int) -> Draw:
    block = parameter.name.partition(".experts.")[0]
    n_experts, n_dropped = parameter.shape[0], round(drop * d_ff)
    dropped_EN = np.argsort(normal(f"{block} dropped", seed, (n_experts, d_ff)))[:, :n_dropped]
    neurons = _neurons(parameter)
    return Draw(parameter.name, seed, noise, dropped_EN if neurons else dropped_EN[:, :0], *(neurons or [0]))


def _neurons(parameter: Parameter) -> list[int]:
    """The axis of an expert's tensor that runs over its neurons; none in the bias of what they write."""
    return [axis for axis, kind in enumerate(parameter.axes[1:]) if kind in (Axis.FFN_WRITE, Axis.FFN_READ)]
