"""Growth: a wider and deeper model that computes the same function.

Units are copied, and the weights that read them are divided among the copies (Net2Net, Chen et al. 2016). A residual
stream of width D' = k·D + r holds k copies and r pads, which are 0 once normalised; η = √(k·D / D') corrects the norms
(LEMON, Wang et al. 2024). docs/mathematics.md derives this, and what becomes of the gradients and so of the moments.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_LAYERS
from mlx_moe.parameters import Axis, Parameter, normal, parameter_table
from mlx_moe.transfer.moe_layout import check_experts_kept, grown_experts
from mlx_moe.transfer.plan import AxisMap, Pad, Plan, TensorPlan, fresh_tensor
from mlx_moe.validation import validate

Split = Literal["uneven", "even"]

RESIDUAL = {Axis.RESIDUAL_READ, Axis.RESIDUAL_WRITE, Axis.NORM}
HEADS_WRITE = {Axis.Q_HEADS_WRITE, Axis.KV_HEADS_WRITE}
UNITS_WRITE = {*HEADS_WRITE, Axis.FFN_WRITE}
READ = {Axis.RESIDUAL_READ, Axis.Q_HEADS_READ, Axis.FFN_READ}

GROWN = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
# Fields that may differ, because they only name the model or steer its training.
CHANGEABLE_FIELDS = ("architecture", "attention_backend", "dropout", "init_std")


def usual_size(config: ModelConfig) -> tuple[int, int]:
    """Return the default (d_model, n_layers): 13/8 as wide and 11/7 as deep; post-norm only wider, by 2."""
    if config.norm_position == "post":
        return 2 * config.d_model, config.n_layers
    return round(config.d_model * 13 / 8), min(round(config.n_layers * 11 / 7), MAX_LAYERS)


def grow_config(
    config: ModelConfig,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
) -> ModelConfig:
    """Return the larger architecture. Omitted sizes grow with the width: heads in whole key-value groups, and `d_ff`.

    Raises InputError if no exact growth leads there.
    """
    per_group = config.n_heads // config.n_kv_heads
    if n_kv_heads is None:
        if n_heads is None:
            n_kv_heads = max(config.n_kv_heads, round(config.n_kv_heads * d_model / config.d_model))
        elif n_heads % per_group:
            raise InputError(
                f"n_heads {n_heads} does not fill whole groups of {per_group} query heads for each key-value head; "
                f"take n_heads {max(per_group, round(n_heads / per_group) * per_group)}"
            )
        else:
            n_kv_heads = n_heads // per_group
    grown = {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_kv_heads * per_group if n_heads is None else n_heads,
        "n_kv_heads": n_kv_heads,
        "d_ff": round(config.d_ff * d_model / config.d_model) if d_ff is None else d_ff,
    }
    _check_size(config, grown)
    eta = residual_scale(config.d_model, d_model)
    moe = grown_experts(config, grown["d_ff"], layer_sources(config.n_layers, n_layers))
    changed = {"norm_eps": eta**2 * config.norm_eps, "moe": moe and moe.model_dump()}
    try:
        return validate(ModelConfig, config.model_dump() | grown | changed)
    except InputError as error:
        raise InputError(*(f"the grown model: {line}" for line in error.lines)) from None


def plan_growth(config: ModelConfig, target: ModelConfig, split: Split = "uneven", seed: int = 0) -> Plan:
    """Return the plan from a model to the larger one described by `grow_config`.

    The copies of a unit divide its reading side: evenly, or unevenly, each with a coefficient of its own. Even copies
    have equal gradients and stay equal for ever. New blocks are copies too, spread evenly over the depth, each after
    the block it copies, and write zeros to the residual stream; their further units are drawn.

    Raises InputError if growth is not exact.
    """
    _check_size(config, {name: getattr(target, name) for name in GROWN})
    _check_kept(config, target)
    growth = _Growth(
        config, target, {parameter.name: parameter.shape for parameter in parameter_table(config)}, split, seed
    )
    return Plan(config, target, tuple(growth.tensor(parameter) for parameter in parameter_table(target)), "grow")


def residual_scale(d_model: int, d_model_target: int) -> float:
    """Return η: the standard deviation over the grown residual axis, relative to the original."""
    return math.sqrt(d_model_target // d_model * d_model / d_model_target)


def layer_sources(n_layers: int, n_layers_target: int) -> list[int]:
    """Return the source layer of every target layer; the first target of each source is the block itself."""
    return [layer_source(layer, n_layers, n_layers_target) for layer in range(n_layers_target)]


def layer_source(layer: int, n_layers: int, n_layers_target: int) -> int:
    return layer * n_layers // n_layers_target


@dataclass(frozen=True)
class _Growth:
    config: ModelConfig
    target: ModelConfig
    source_shapes: dict[str, tuple[int, ...]]
    split: Split
    seed: int

    def tensor(self, parameter: Parameter) -> TensorPlan:
        source, is_new = self.source_of(parameter.name)
        if is_new and Axis.RESIDUAL_WRITE in parameter.axes:
            return fresh_tensor(parameter.name, parameter.shape, "constant")
        maps, pads = [], []
        for axis, (kind, size) in enumerate(zip(parameter.axes, self.source_shapes[source], strict=True)):
            index = self.index(kind, size, parameter.shape[axis], is_new)
            maps.append(self.axis_map(parameter, axis, size, index))
            if index.max() >= size:
                pads.append(self.pad(parameter, axis, int(index.max()) + 1 - size))
        changed = tuple(axis_map for axis_map in maps if axis_map is not None)
        return TensorPlan(parameter.name, parameter.shape, source, pads=tuple(pads), maps=changed, is_new=is_new)

    def source_of(self, name: str) -> tuple[str, bool]:
        """Return the tensor that a target tensor copies, and whether its block is new."""
        match = re.match(r"layers\.(\d+)\.", name)
        if match is None:
            return name, False
        layer = int(match[1])
        source = layer_source(layer, self.config.n_layers, self.target.n_layers)
        is_new = layer > 0 and layer_source(layer - 1, self.config.n_layers, self.target.n_layers) == source
        return f"layers.{source}.{name[match.end() :]}", is_new

    def index(self, kind: Axis, size: int, size_target: int, is_new: bool) -> NDArray[np.int64]:
        """Return the source coordinate of every target coordinate of an axis; from `size` on, a pad's.

        The outputs of a new block start at zero, so copies of its neurons and heads would get equal gradients under any
        split: only the first is a copy there, unless the split is even.
        """
        # Head groups are contiguous, so cycling through the rows duplicates whole groups.
        index = np.arange(size_target) % size
        whole = size_target
        if kind in RESIDUAL:
            whole = size_target // size * size
        elif kind in UNITS_WRITE and is_new and self.split == "uneven":
            whole = size
        index[whole:] = size + np.arange(size_target - whole)
        return index

    def pad(self, parameter: Parameter, axis: int, count: int) -> Pad:
        kind = parameter.axes[axis]
        if kind is Axis.NORM:
            return Pad(axis, count, "constant", float(parameter.start == "ones"))
        if kind is Axis.RESIDUAL_WRITE:
            return Pad(axis, count, "constant" if self.target.normalization == "rmsnorm" else "mean")
        # A normalised pad is 0 only up to rounding, and a router with tied experts would follow the rounding.
        if parameter.axes == (Axis.EXPERT, Axis.RESIDUAL_READ) or parameter.start == "zeros":
            return Pad(axis, count, "constant")
        # If nothing wrote and nothing read a pad, no gradient would ever flow, so draw the reading weights.
        name = f"{parameter.name} {'pad' if kind is Axis.RESIDUAL_READ else 'units'}"
        return Pad(axis, count, "normal", self.target.init_std, name, self.seed)

    def axis_map(self, parameter: Parameter, axis: int, size: int, index: NDArray[np.int64]) -> AxisMap | None:
        kind, size_target = parameter.axes[axis], parameter.shape[axis]
        shares = self.shares(parameter, kind, index)
        scale = shares.copy() if self.shares_out(parameter, kind) else np.ones(size_target)
        if kind is Axis.NORM and parameter.start == "ones":
            scale *= residual_scale(size, size_target)
        if self.is_normalised(parameter.name) and kind in HEADS_WRITE:
            scale *= residual_scale(self.config.d_model, self.target.d_model)
        if np.all(scale == 1) and np.array_equal(index, np.arange(size_target)):
            return None
        gradient = shares / scale
        return AxisMap(
            axis,
            index,
            None if np.all(scale == 1) else scale,
            None if np.all(gradient == 1) else (gradient, gradient**2),
        )

    def is_normalised(self, name: str) -> bool:
        """Return whether a norm of heads follows; the grown ε' = η²·ε, which it shares, requires inputs scaled by η."""
        return self.target.qk_norm and (".q_proj." in name or ".k_proj." in name)

    def shares_out(self, parameter: Parameter, kind: Axis) -> bool:
        """Return whether the tensor holds the coefficients of the copies that it reads.

        A tied head repeats as a writer, so the norm before it holds them.
        """
        return kind in READ or (self.target.weight_tying and parameter.name.startswith("norm."))

    def shares(self, parameter: Parameter, kind: Axis, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the share of a unit's gradient that comes back through each copy: its reader's coefficients.

        With several readers it is their mean, 1/n, which is right on average.
        """
        if self.shares_out(parameter, kind):
            return self.coefficients(parameter.name, index)
        module, _, projection = parameter.name.rpartition(".")[0].rpartition(".")
        if kind is Axis.FFN_WRITE:
            return self.coefficients(f"{module}.down_proj.weight", index)
        if projection == "v_proj" and kind is Axis.KV_HEADS_WRITE:
            group = (self.target.n_kv_heads, -1, self.target.head_dim)
            heads = np.arange(self.target.n_heads * self.target.head_dim) % (self.config.n_heads * self.config.head_dim)
            return self.coefficients(f"{module}.o_proj.weight", heads).reshape(group).mean(axis=1).ravel()
        if projection == "norm":
            return self.coefficients("lm_head.weight", index)
        return 1 / np.bincount(index)[index]

    def coefficients(self, name: str, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a coefficient per target coordinate; those of the copies of one source coordinate sum to 1.

        Uneven coefficients of n copies are evenly spaced from 1/2n to 3/2n, in an order drawn for every tensor and
        source coordinate: with one order throughout, the gradients of tensors that write the copies would be
        proportional, and Adam, blind to scale, could not tell them apart.
        """
        copies = np.bincount(index)[index]
        if self.split == "even":
            return 1 / copies
        order = np.lexsort((normal(f"{name} split", self.seed, index.shape), index))
        rank = np.empty_like(index)
        rank[order] = np.arange(len(index)) - np.searchsorted(index[order], index[order])
        return np.where(copies == 1, 1.0, (0.5 + rank / np.maximum(copies - 1, 1)) / copies)


def _check_size(config: ModelConfig, grown: dict[str, int]) -> None:
    for name, after in grown.items():
        before = getattr(config, name)
        if after < before:
            raise InputError(f"growth cannot shrink {name} from {before} to {after}; take at least {before}")
    per_group = config.n_heads // config.n_kv_heads
    if grown["n_heads"] != per_group * grown["n_kv_heads"]:
        raise InputError(
            f"n_heads {grown['n_heads']} with n_kv_heads {grown['n_kv_heads']}: heads grow in whole groups of "
            f"{per_group} query heads for each key-value head; take n_heads {per_group * grown['n_kv_heads']}"
        )
    if config.norm_position == "post":
        _check_post_norm(config, grown)


def _check_post_norm(config: ModelConfig, grown: dict[str, int]) -> None:
    """Raise InputError if a post-norm model would become deeper, or, without RMSNorm, wider by a fraction."""
    if grown["n_layers"] > config.n_layers:
        raise InputError(
            f"post-norm blocks cannot be deepened exactly: a new block that adds nothing still normalises the residual "
            f"stream, so it is not the identity; keep n_layers {config.n_layers}, or train with norm_position pre"
        )
    if config.normalization != "rmsnorm" and grown["d_model"] % config.d_model:
        multiple = max(1, round(grown["d_model"] / config.d_model)) * config.d_model
        raise InputError(
            f"post-norm {config.normalization} cannot be widened exactly from {config.d_model} to {grown['d_model']}: "
            f"a norm's output would have to hold its own mean in the pads; take d_model {multiple}"
        )


def _check_kept(config: ModelConfig, target: ModelConfig) -> None:
    check_experts_kept(config, target, layer_sources(config.n_layers, target.n_layers))
    before, after = _function(config), _function(target)
    for name in before:
        if before[name] != after[name]:
            raise InputError(
                f"growth keeps {name}: cannot go from {before[name]} to {after[name]}; take {before[name]}"
            )
    eps = residual_scale(config.d_model, target.d_model) ** 2 * config.norm_eps
    if not math.isclose(target.norm_eps, eps, rel_tol=1e-6):
        raise InputError(f"growth is exact for norm_eps {eps:g}, not {target.norm_eps:g}; take it from grow_config")


def _function(config: ModelConfig) -> dict[str, Any]:
    """Return every field that must not change if the model is to compute the same function."""
    fields = set(ModelConfig.model_fields) - {*GROWN, *CHANGEABLE_FIELDS, "norm_eps", "moe"}
    return {name: getattr(config, name) for name in ModelConfig.model_fields if name in fields}
