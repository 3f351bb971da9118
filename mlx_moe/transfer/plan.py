"""A transfer, written down: which row of which tensor goes where, times what.

A backend executes a plan natively in a few lines. Whatever involves a sum or a random draw is computed here, in
float64 and rounded once, so that all executions give the same float32 numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import normal
from mlx_moe.transfer.draws import Draw


@dataclass(frozen=True, eq=False)
class AxisMap:
    """`target[i] = scale[i] * source[index[i]]` along one axis; a scale of None is all ones.

    An index at or beyond the source's size points into the pad rows. Executions round the scale once, to the dtype of
    the array. `gradient` is the scale for the mean of the loss's gradient, and that for the mean of its square.
    """

    axis: int
    index: NDArray[np.int64]
    scale: NDArray[np.float64] | None = None
    gradient: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None


@dataclass(frozen=True)
class Pad:
    """Rows appended to the source along one axis, before the maps.

    ==========  ==================================================
    constant    `value`
    mean        the mean of the source along the axis
    normal      standard normal numbers times `value`, drawn for (`name`, `seed`, shape)
    ==========  ==================================================
    """

    axis: int
    count: int
    kind: Literal["constant", "mean", "normal"]
    value: float = 0.0
    name: str = ""
    seed: int = 0

    def rows(self, source: NDArray[Any]) -> NDArray[Any]:
        """The source's shape but `count` along `axis`, in the source's dtype."""
        shape = (*source.shape[: self.axis], self.count, *source.shape[self.axis + 1 :])
        if self.kind == "constant":
            return np.full(shape, self.value, source.dtype)
        if self.kind == "mean":
            mean = source.mean(axis=self.axis, dtype=np.float64, keepdims=True)
            return np.repeat(mean.astype(source.dtype), self.count, axis=self.axis)
        return (normal(self.name, self.seed, shape) * np.float32(self.value)).astype(source.dtype)


@dataclass(frozen=True)
class TensorPlan:
    """How one target tensor comes about.

    Take the source, view it as `source[None]` if `new_axis`, append the pad's rows, then apply the maps in order.
    A tensor without a source is `fresh()`: nothing but pad. `is_new`: it copies weights, but its gradient is its own.
    With a `draw`, the weights are its experts of the source instead.
    """

    target: str
    shape: tuple[int, ...]
    source: str | None
    new_axis: bool = False
    pad: Pad | None = None
    maps: tuple[AxisMap, ...] = ()
    is_new: bool = False
    draw: Draw | None = None

    def moments(self, power: int) -> TensorPlan:
        """How the mean of the gradient (power 1) or of its square (2) comes about; 0 in pads and in what is new."""
        if self.source is None or self.is_new or (self.draw and self.draw.dropped_EN.size):
            return fresh_tensor(self.target, self.shape, "constant")
        pad = Pad(self.pad.axis, self.pad.count, "constant") if self.pad else None
        maps = (AxisMap(old.axis, old.index, old.gradient and old.gradient[power - 1]) for old in self.maps)
        return replace(self, pad=pad, maps=tuple(maps), draw=None)

    def fresh(self) -> NDArray[np.float32]:
        """The tensor that has no source, of shape `shape`."""
        assert self.pad is not None
        return self.pad.rows(np.empty((0, *self.shape[1:]), np.float32))


@dataclass(frozen=True)
class Plan:
    """One TensorPlan for every tensor of the target, in the order of its table."""

    source_config: ModelConfig
    target_config: ModelConfig
    tensors: tuple[TensorPlan, ...]

    @property
    def is_lossy(self) -> bool:
        """Whether it is meant to change the model."""
        return any(tensor.draw is not None for tensor in self.tensors)

    def moments(self, power: int) -> Plan:
        """The plan for Adam's first moments (power 1; Muon's momentum too) or second moments (power 2)."""
        return replace(self, tensors=tuple(tensor.moments(power) for tensor in self.tensors))


def apply(plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The target's arrays, in the dtype of the source's, sharing no memory with them: the NumPy execution."""
    dtype = next(iter(arrays.values())).dtype
    return {
        tensor.target: tensor.fresh().astype(dtype)
        if tensor.source is None
        else _execute(tensor, arrays[tensor.source])
        for tensor in plan.tensors
    }


def carry_moments(plan: Plan, state: Mapping[str, NDArray[Any]], kept: Collection[str]) -> dict[str, NDArray[Any]]:
    """An optimizer's state after a transfer: `m.{name}` and `v.{name}` through the plan, the rest as it was.

    `kept` names what the target's optimizer remembers: Muon, for one, has no second moments.
    """
    carried = {name: array for name, array in state.items() if not name.startswith(("m.", "v."))}
    for power, moment in ((1, "m."), (2, "v.")):
        moments = plan.moments(power)
        tensors = tuple(tensor for tensor in moments.tensors if moment + tensor.target in kept)
        arrays = {name.removeprefix(moment): array for name, array in state.items() if name.startswith(moment)}
        after = apply(replace(moments, tensors=tensors), arrays)
        carried |= {moment + name: array for name, array in after.items()}
    return carried


def fresh_tensor(
    name: str, shape: tuple[int, ...], kind: Literal["constant", "normal"], value: float = 0.0, seed: int = 0
) -> TensorPlan:
    """A tensor that starts anew: constant, or normal with a standard deviation of `value`."""
    return TensorPlan(name, shape, source=None, pad=Pad(0, shape[0], kind, value, name, seed))


def _execute(plan: TensorPlan, source: NDArray[Any]) -> NDArray[Any]:
    if plan.draw is not None:
        return plan.draw.experts(source)
    array = np.array(source[None] if plan.new_axis else source)
    if plan.pad is not None:
        array = np.concatenate([array, plan.pad.rows(array)], axis=plan.pad.axis)
    for axis_map in plan.maps:
        array = np.take(array, axis_map.index, axis=axis_map.axis)
        if axis_map.scale is not None:
            along_axis = [-1 if axis == axis_map.axis else 1 for axis in range(array.ndim)]
            array *= axis_map.scale.astype(array.dtype).reshape(along_axis)
    return array
