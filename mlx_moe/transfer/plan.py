"""Plans of transfers: the source, destination and scale of every row of every tensor.

A backend executes a plan natively in a few lines. Sums and random draws are computed here, in float64 and rounded once,
so that all executions give the same float32 numbers, bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import LazyWeights, Weights, normal
from mlx_moe.storage.tensor_files import Blocks
from mlx_moe.transfer.expert_noise import ExpertNoise

BLOCK = 1 << 19  # elements; intermediate results take a few times that


@dataclass(frozen=True, eq=False)
class AxisMap:
    """`target[i] = scale[i] * source[index[i]]` along one axis; a scale of None is all ones.

    An index at or beyond the source's size points into the pad rows. Executions round the scale once, to the dtype of
    the array. `gradient` holds the scales of the mean gradient and of the mean squared gradient.
    """

    axis: int
    index: NDArray[np.int64]
    scale: NDArray[np.float64] | None = None
    gradient: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None


@dataclass(frozen=True, eq=False)
class Pad:
    """Rows appended to the source along one axis, before the maps.

    ==========  ==================================================
    constant    `value`
    mean        the mean of the source along the axis
    normal      standard normal numbers times `value`, drawn for (`name`, `seed`, shape)
    given       `values`
    ==========  ==================================================
    """

    axis: int
    count: int
    kind: Literal["constant", "mean", "normal", "given"]
    value: float = 0.0
    name: str = ""
    seed: int = 0
    values: NDArray[np.float32] | None = None

    def rows(self, source: NDArray[Any], shape: Sequence[int] | None = None) -> NDArray[Any]:
        """Return `count` rows along `axis` in the source's dtype; other axes are those of `shape`, else the source's.

        Earlier pads may have made `shape` larger than the source. The result is read-only.
        """
        before = source.shape if shape is None else shape
        shape = (*before[: self.axis], self.count, *before[self.axis + 1 :])
        if self.kind == "constant":
            return np.broadcast_to(source.dtype.type(self.value), shape)
        if self.kind == "mean":
            mean = source.mean(axis=self.axis, dtype=np.float64, keepdims=True)
            return np.broadcast_to(mean.astype(source.dtype), shape)
        if self.values is not None:
            return self.values.astype(source.dtype, copy=False)
        drawn = normal(self.name, self.seed, shape)
        drawn *= np.float32(self.value)
        return drawn.astype(source.dtype, copy=False)


@dataclass(frozen=True)
class TensorPlan:
    """Recipe of one target tensor.

    Take the source; if `new_axis`, cut it along `cut_axis` into `n_parts` equal parts, and stack these as a first axis;
    append the pads' rows, then apply the maps; at most one pad and one map per axis, in the order of the axes. A tensor
    without a source is `fresh()`: only pad. `is_new`: it copies weights, but starts without moments. A `draw` then
    changes the weights of each expert.
    """

    target: str
    shape: tuple[int, ...]
    source: str | None
    new_axis: bool = False
    cut_axis: int = 0
    n_parts: int = 1
    pads: tuple[Pad, ...] = ()
    maps: tuple[AxisMap, ...] = ()
    is_new: bool = False
    draw: ExpertNoise | None = None

    def moments(self, power: int) -> TensorPlan:
        """Return the recipe of the first (power 1) or second (2) moment; 0 in pads and new tensors."""
        if self.source is None or self.is_new or (self.draw and self.draw.dropped_EN.size):
            return fresh_tensor(self.target, self.shape, "constant")
        pads = tuple(Pad(pad.axis, pad.count, "constant") for pad in self.pads)
        maps = (AxisMap(old.axis, old.index, old.gradient and old.gradient[power - 1]) for old in self.maps)
        return replace(self, pads=pads, maps=tuple(maps), draw=None)

    def fresh(self) -> NDArray[np.float32]:
        """Return a tensor without a source, of shape `shape`."""
        (array,) = blocks(self, None, sys.maxsize)
        return np.array(array)

    def drawn(self, source: NDArray[Any]) -> NDArray[Any]:
        """Return the experts of a tensor with a `draw`, (E, ...)."""
        return np.stack(list(blocks(self, source)))


@dataclass(frozen=True)
class Plan:
    """A TensorPlan for every target tensor, in the order of the parameter table."""

    source_config: ModelConfig
    target_config: ModelConfig
    tensors: tuple[TensorPlan, ...]
    kind: str = ""  # name of the transfer in the registry

    @property
    def is_lossy(self) -> bool:
        """True if the transfer changes the model by design."""
        return any(tensor.draw is not None for tensor in self.tensors)

    def moments(self, power: int) -> Plan:
        """Return the plan for Adam's first moments (power 1; also Muon's momentum) or second moments (power 2)."""
        return replace(self, tensors=tuple(tensor.moments(power) for tensor in self.tensors))


def apply_lazily(plan: Plan, weights: Weights) -> LazyWeights:
    """Return the target's weights, computed lazily."""
    tensors = {tensor.target: tensor for tensor in plan.tensors}
    return LazyWeights(tensors, lambda name: _whole(tensors[name], weights))


def apply_streaming(plan: Plan, weights: Weights) -> Blocks:
    """Return the target's weights in blocks for a file, so that large tensors need little memory."""
    tensors = {tensor.target: tensor for tensor in plan.tensors}

    def of(name: str) -> Iterator[NDArray[Any]]:
        source = tensors[name].source
        return blocks(tensors[name], None if source is None else weights[source])

    return of


def apply_numpy(plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Execute the plan in NumPy; return new arrays in the dtype of the source's."""
    dtype = next(iter(arrays.values())).dtype
    return {tensor.target: _whole(tensor, arrays).astype(dtype, copy=False) for tensor in plan.tensors}


def _whole(plan: TensorPlan, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    if plan.source is None:
        return plan.fresh()
    if plan.draw is not None:
        return plan.drawn(arrays[plan.source])
    (array,) = blocks(plan, arrays[plan.source], size=sys.maxsize)
    return array if array.flags.owndata else array.copy()


def carry_moments(plan: Plan, state: Mapping[str, NDArray[Any]], kept: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return an optimizer's state after a transfer: `m.{name}` and `v.{name}` by the plan, other entries unchanged.

    `kept` lists the entries of the target's optimizer: Muon, for one, has no second moments.
    """
    carried = {name: array for name, array in state.items() if not name.startswith(("m.", "v."))}
    for power, moment in ((1, "m."), (2, "v.")):
        moments = plan.moments(power)
        tensors = tuple(tensor for tensor in moments.tensors if moment + tensor.target in kept)
        arrays = {name.removeprefix(moment): array for name, array in state.items() if name.startswith(moment)}
        after = apply_numpy(replace(moments, tensors=tensors), arrays)
        carried |= {moment + name: array for name, array in after.items()}
    return carried


def fresh_tensor(
    name: str, shape: tuple[int, ...], kind: Literal["constant", "normal"], value: float = 0.0, seed: int = 0
) -> TensorPlan:
    """Return the plan of a tensor without a source: constant, or normal with a standard deviation of `value`."""
    return TensorPlan(name, shape, source=None, pads=(Pad(0, shape[0], kind, value, name, seed),))


def blocks(plan: TensorPlan, source: NDArray[Any] | None, size: int = BLOCK) -> Iterator[NDArray[Any]]:
    """Yield the target's values in memory order, in pieces of about `size` elements; views where the source has them.

    All pads are computed first, so that no sum depends on the pieces.
    """
    if plan.draw is not None and source is not None:
        copies = blocks(replace(plan, draw=None), source, math.prod(plan.shape[1:]))
        yield from (plan.draw.expert(expert, copy[0]) for expert, copy in enumerate(copies))
        return
    array = np.empty((0, *plan.shape[1:]), np.float32) if source is None else source
    if plan.new_axis:
        cut = list(array.shape)
        cut[plan.cut_axis : plan.cut_axis + 1] = [plan.n_parts, -1]
        array = np.moveaxis(array.reshape(cut), plan.cut_axis, 0)
    shape, rows = list(array.shape), dict[int, NDArray[Any]]()
    for pad in plan.pads:
        rows[pad.axis] = pad.rows(array, shape)
        shape[pad.axis] += pad.count
    index = [np.arange(length) for length in shape]
    for axis_map in plan.maps:
        index[axis_map.axis] = axis_map.index
    for box in _boxes([len(along_axis) for along_axis in index], size):
        yield _block(plan, array, rows, index, box)


def _boxes(shape: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Yield slices of an array of about `size` elements, each contiguous in memory; in order, they cover it."""
    first, *rest = shape
    inner = math.prod(rest)
    if inner > size:
        for row in range(first):
            yield from ((slice(row, row + 1), *box) for box in _boxes(rest, size))
        return
    step = size // max(inner, 1)
    for start in range(0, first, step):
        yield (slice(start, min(start + step, first)), *(slice(0, length) for length in rest))


def _block(
    plan: TensorPlan,
    array: NDArray[Any],
    rows: Mapping[int, NDArray[Any]],
    index: Sequence[NDArray[np.int64]],
    box: tuple[slice, ...],
) -> NDArray[Any]:
    for axis, (along_axis, part) in enumerate(zip(index, box, strict=True)):
        wanted = along_axis[part]
        array = _take_padded(array, rows[axis], wanted, axis) if axis in rows else _take(array, wanted, axis)
        rows = {later: _take(pad, wanted, axis) for later, pad in rows.items() if later > axis}
    for axis_map in plan.maps:
        if axis_map.scale is not None:
            scale = axis_map.scale[box[axis_map.axis]].astype(array.dtype)
            array = array * scale.reshape([-1 if axis == axis_map.axis else 1 for axis in range(array.ndim)])
    return array


def _take(array: NDArray[Any], wanted: NDArray[np.int64], axis: int) -> NDArray[Any]:
    first = int(wanted[0])
    if np.array_equal(wanted, np.arange(first, first + len(wanted))):
        return array[(slice(None),) * axis + (slice(first, first + len(wanted)),)]
    if array.flags.c_contiguous:
        return np.take(array, wanted, axis)
    return array[(slice(None),) * axis + (wanted,)]  # np.take would first copy the whole array


def _take_padded(array: NDArray[Any], rows: NDArray[Any], wanted: NDArray[np.int64], axis: int) -> NDArray[Any]:
    beyond = wanted >= array.shape[axis]
    if beyond.all():
        return _take(rows, wanted - array.shape[axis], axis)
    if not beyond.any():
        return _take(array, wanted, axis)
    order = np.argsort(beyond, kind="stable")
    inside, outside = np.split(wanted[order], [len(wanted) - np.count_nonzero(beyond)])
    parts = _take(array, inside, axis), _take(rows, outside - array.shape[axis], axis)
    return _take(np.concatenate(parts, axis), np.argsort(order), axis)
