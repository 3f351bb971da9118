"""AdamW, and Muon for the hidden matrices, with their state as named arrays, on MLX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
from mlx.optimizers import MultiOptimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_moe.accounting.memory import FLOAT
from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.kernel_sizes import MLX_UPDATE_PART, MLX_UPDATED_AT_ONCE
from mlx_moe.parameters import Arrays, OptimizerGroup, check_optimizer_state, optimizer_groups, parameter_table
from mlx_moe.training.muon import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, SMALLEST_NORM, update_rms
from mlx_moe.training.step_settings import StepSettings

Array = mx.array


class Muon(optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices (out, in) and on stacks of them (E, out, in), each for itself.

    Nesterov momentum, decoupled decay, steps as large as `update_rms` says. `dtype` is that of the iteration.
    """

    def __init__(
        self,
        learning_rate: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: mx.Dtype = mx.float32,
    ):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dtype = dtype

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["m"] = self.momentum * state["m"] + (1 - self.momentum) * gradient
        nesterov = self.momentum * state["m"] + (1 - self.momentum) * gradient
        direction = orthogonalize(nesterov, self.dtype).astype(parameter.dtype)
        scale = self.learning_rate * update_rms(parameter.shape)
        return parameter * (1 - self.learning_rate * self.weight_decay) - scale * direction


def orthogonalize(matrices: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return U·Vᵀ of every matrix U·S·Vᵀ in (..., out, in), with singular values near 1; by products in `dtype`."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.swapaxes(-2, -1) if is_tall else matrices).astype(dtype)
    # One axis after the other: on CPU, one sum over a million squares is wrong in the third digit.
    squares = mx.square(x).sum(axis=-2, keepdims=True).sum(axis=-1, keepdims=True)
    x = x / mx.maximum(mx.sqrt(squares), SMALLEST_NORM)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(-2, -1)
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x.swapaxes(-2, -1) if is_tall else x


def build_optimizer(parameters: Mapping[str, Array], settings: StepSettings) -> MultiOptimizer:
    """Return AdamW, or Muon and AdamW, for the trained parameters. The learning rate is 0 until each step sets it."""
    optimizer = settings.optimizer

    def build(group: OptimizerGroup) -> optim.Optimizer:
        if group.rule == "muon":
            return Muon(momentum=optimizer.momentum, weight_decay=group.weight_decay)
        return optim.AdamW(0.0, list(optimizer.betas), optimizer.eps, group.weight_decay, bias_correction=True)

    groups = update_groups(settings.model, optimizer)
    filters = [lambda name, _, names=frozenset(group.names): name in names for group in groups[:-1]]
    multi = MultiOptimizer([build(group) for group in groups], filters)
    multi.init(tree_unflatten(list(parameters.items())))
    return multi


def update_groups(config: ModelConfig, optimizer: OptimizerConfig) -> list[OptimizerGroup]:
    """Return the groups of parameters that are updated at once: a rule's; of a large model, parts of them.

    An update puts new weights and moments beside the old ones. In parts, only one part at a time has both.
    """
    groups = optimizer_groups(config, optimizer)
    sizes = {p.name: FLOAT * math.prod(p.shape) for p in parameter_table(config) if p.is_trained}
    if sum(sizes.values()) <= MLX_UPDATED_AT_ONCE:
        return groups
    parts = []
    for group in groups:
        names, size = list[str](), 0
        for name in group.names:
            if names and size + sizes[name] > MLX_UPDATE_PART:
                parts.append(replace(group, names=names))
                names, size = [], 0
            names.append(name)
            size += sizes[name]
        parts.append(replace(group, names=names))
    return parts


def state_tensors(multi: MultiOptimizer) -> dict[str, Array]:
    """Return the tensors of `parameters.optimizer_table`, not copied; zeros before the first step."""
    tensors: dict[str, Array] = {}
    for state in multi.state["states"]:
        for path, array in tree_flatten(state):
            name, _, moment = path.rpartition(".")
            if moment in ("m", "v"):
                tensors[f"{moment}.{name}"] = array
            elif path == "step":
                tensors["step"] = array.astype(mx.float32)
    return tensors


def load_optimizer_state(multi: MultiOptimizer, settings: StepSettings, arrays: Arrays) -> None:
    """Continue from a state that either backend wrote. Raises InputError if it is not of this model and optimizer.

    The containers of the old state stay, since compiled graphs are bound to them.
    """
    check_optimizer_state(settings.model, settings.optimizer, arrays)
    for state in multi.state["states"]:
        for path, value in tree_flatten(state):
            name, _, moment = path.rpartition(".")
            *parents, leaf = path.split(".")
            container = state
            for key in parents:
                container = container[int(key) if isinstance(container, list) else key]
            if path == "step":
                container[leaf] = mx.array(int(arrays["step"]), dtype=value.dtype)
            elif moment in ("m", "v"):
                container[leaf] = mx.array(arrays[f"{moment}.{name}"])
