"""Upcycling: a dense model becomes a mixture of identical experts that computes the same function.

The gates sum to 1 and the experts are equal, so their weighted sum is the dense FFN under any router (Komatsuzaki et
al. 2022, Sparse Upcycling). Experts that are told apart, by noise or by neurons that start anew (Drop-Upcycling,
Nakamura et al. 2025: half of them), are not, and the model pays for it at first.

Gradients. The experts' gradients sum to the dense one, so in the mean over experts m' = m / E, exactly. Squares follow
the noise of the batch, which is most of them: of N tokens' gradients, weighted by gates near 1/K, an expert averages
N·K / E, so v' = v / (K·E), where a gradient without noise had v / E². Measured: docs/optimizer-transfer.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from mlx_moe.config import ModelConfig, MoEConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Axis, Parameter, normal, table
from mlx_moe.transfer.draws import Draw
from mlx_moe.transfer.plan import AxisMap, Plan, TensorPlan, fresh_tensor

ZERO_ROUTER_WARNING = (
    "router_init zero: all router logits tie, so every token goes to the first top_k experts, which get identical "
    "updates; the router's gradient from the task is exactly 0 and the model stays dense. Take router_init random, "
    "which is just as exact at the boundary"
)

LOSSY_METHOD = "noise and drop change the model on purpose; the figures above say by how much"


def plan_upcycling(
    config: ModelConfig,
    moe: MoEConfig,
    router_init: Literal["random", "zero"] = "random",
    router_std: float = 0.02,
    seed: int = 0,
    noise: float = 0.0,
    drop: float = 0.0,
) -> Plan:
    """The plan from a dense model to experts that are all copies of its FFN.

    With `noise` (a standard deviation, relative to that of each tensor) or with `drop` (the share of the neurons that
    each expert draws anew, the same ones in all its projections) they differ, and the plan is lossy. The router is
    normal with standard deviation `router_std`, or zero (see ZERO_ROUTER_WARNING).

    Raises InputError if the model has experts already.
    """
    if config.moe is not None:
        raise InputError(f"the model has {config.moe.n_experts} experts already; upcycle a dense one")
    target = config.model_copy(update={"moe": moe})
    dense = {parameter.name for parameter in table(config)}
    std = router_std if router_init == "random" else 0.0
    tensors = [_tensor(parameter, dense, moe.top_k, std, seed) for parameter in table(target)]
    if noise or drop:
        tensors = [
            replace(tensor, draw=_draw(parameter, config.d_ff, noise, drop, seed)) if tensor.new_axis else tensor
            for parameter, tensor in zip(table(target), tensors, strict=True)
        ]
    return Plan(config, target, tuple(tensors))


def _draw(parameter: Parameter, d_ff: int, noise: float, drop: float, seed: int) -> Draw:
    block = parameter.name.partition(".experts.")[0]
    n_experts, n_dropped = parameter.shape[0], round(drop * d_ff)
    dropped_EN = np.argsort(normal(f"{block} dropped", seed, (n_experts, d_ff)))[:, :n_dropped]
    neurons = [axis for axis, kind in enumerate(parameter.axes[1:]) if kind in (Axis.FFN_WRITE, Axis.FFN_READ)]
    # The bias of what the neurons write belongs to none of them.
    return Draw(parameter.name, seed, noise, dropped_EN if neurons else dropped_EN[:, :0], *(neurons or [0]))


def _tensor(parameter: Parameter, dense: set[str], top_k: int, router_std: float, seed: int) -> TensorPlan:
    if parameter.name in dense:
        return TensorPlan(parameter.name, parameter.shape, source=parameter.name)
    if parameter.axes == (Axis.EXPERT, Axis.RESIDUAL_READ):
        kind: Literal["constant", "normal"] = "normal" if router_std else "constant"
        return fresh_tensor(parameter.name, parameter.shape, kind, router_std, seed)
    n_experts, per_expert = parameter.shape[0], np.ones(parameter.shape[0])
    gradient = (per_expert / n_experts, per_expert / (n_experts * top_k))
    copies = AxisMap(axis=0, index=np.zeros(n_experts, np.int64), gradient=gradient)
    source = parameter.name.replace(".experts.", ".")
    return TensorPlan(parameter.name, parameter.shape, source, new_axis=True, maps=(copies,))
