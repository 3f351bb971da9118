"""Permutation of a model's units: equal in exact arithmetic, but every sum rounds differently."""

from __future__ import annotations

import numpy as np

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Axis, Parameter, normal, parameter_table
from mlx_moe.transfer.growth import RESIDUAL
from mlx_moe.transfer.plan import AxisMap, Plan, TensorPlan


def plan_permutation(config: ModelConfig, seed: int = 0) -> Plan:
    """Return a plan that permutes the residual stream's coordinates and each layer's FFN neurons; heads stay."""
    return Plan(config, config, tuple(_tensor(parameter, seed) for parameter in parameter_table(config)))


def _tensor(parameter: Parameter, seed: int) -> TensorPlan:
    maps = []
    for axis, (kind, size) in enumerate(zip(parameter.axes, parameter.shape, strict=True)):
        if kind in RESIDUAL:
            maps.append(AxisMap(axis, _order("residual", seed, size)))
        elif kind in (Axis.FFN_WRITE, Axis.FFN_READ):
            maps.append(AxisMap(axis, _order(parameter.name.partition(".mlp.")[0], seed, size)))
    return TensorPlan(parameter.name, parameter.shape, parameter.name, maps=tuple(maps))


def _order(name: str, seed: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    order: np.ndarray[tuple[int], np.dtype[np.int64]] = np.argsort(normal(f"{name} order", seed, (size,)))
    return order
