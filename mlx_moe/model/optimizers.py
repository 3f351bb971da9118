"""AdamW, and Muon for the hidden matrices, with their state as named arrays, on MLX."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_moe.accounting.memory import FLOAT, MLX_UPDATE_PART, MLX_UPDATED_AT_ONCE
from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.parameters import Arrays, OptimizerGroup, check_optimizer_state, optimizer_groups, table

# The quintic of Jordan et al. 2024: steep at 0 rather than exact at 1. After 5 steps, singular values that were 0.15 %
# or more of the matrix's Frobenius norm lie between 0.68 and 1.21.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7  # a gradient of 0, such as that of an expert that no token chose, gives a direction of 0


class Muon(optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices (out, in) and on stacks of them (E, out, in), each for itself.

    Nesterov momentum, decoupled decay. Orthogonal matrices are scaled by 0.2·√max(out, in) to AdamW's usual root mean
    square, so that one learning rate and one decay serve both (Moonlight, Liu et al. 2025).
    `dtype` is that of the Newton–Schulz iteration.
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
        scale = self.learning_rate * (0.2 * max(parameter.shape[-2:]) ** 0.5)
        return parameter * (1 - self.learning_rate * self.weight_decay) - scale * direction


def orthogonalize(matrices: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """U·Vᵀ of every matrix U·S·Vᵀ in (..., out, in), with singular values near 1; by products only, in `dtype`."""
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


def build_optimizer(config: ModelConfig, optimizer: OptimizerConfig) -> optim.MultiOptimizer:
    """AdamW, or Muon and AdamW. The learning rate is 0 until each step sets it."""

    def build(group: OptimizerGroup) -> optim.Optimizer:
        if group.rule == "muon":
            return Muon(momentum=optimizer.momentum, weight_decay=group.weight_decay)
        return optim.AdamW(0.0, list(optimizer.betas), optimizer.eps, group.weight_decay, bias_correction=True)

    groups = update_groups(config, optimizer)
    filters = [lambda name, _, names=frozenset(group.names): name in names for group in groups[:-1]]
    return optim.MultiOptimizer([build(group) for group in groups], filters)


def update_groups(config: ModelConfig, optimizer: OptimizerConfig) -> list[OptimizerGroup]:
    """What is updated in one go: a rule's parameters; of a large model parts of them, one after the other.

    An update puts new weights and moments beside the old ones. Of parts, only one at a time has both.
    """
    groups = optimizer_groups(config, optimizer)
    sizes = {p.name: FLOAT * math.prod(p.shape) for p in table(config) if p.is_trained}
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


def state_tensors(optimizer: optim.MultiOptimizer) -> dict[str, mx.array]:
    """Those of `parameters.optimizer_table`, as they are; zeros before the first step."""
    tensors: dict[str, mx.array] = {}
    for state in optimizer.state["states"]:
        for path, array in tree_flatten(state):
            name, _, moment = path.rpartition(".")
            if moment in ("m", "v"):
                tensors[f"{moment}.{name}"] = array
            elif path == "step":
                tensors["step"] = array.astype(mx.float32)
    return tensors


def load_optimizer_state(
    multi: optim.MultiOptimizer, config: ModelConfig, optimizer: OptimizerConfig, arrays: Arrays
) -> None:
    """Go on from a state that either backend wrote. Raises InputError where it is not of this model and optimizer."""
    check_optimizer_state(config, optimizer, arrays)

    def restore(path: str, value: mx.array) -> mx.array:
        name, _, moment = path.rpartition(".")
        if path == "step":
            return mx.array(int(arrays["step"]), dtype=value.dtype)
        return mx.array(arrays[f"{moment}.{name}"]) if moment in ("m", "v") else value

    multi.state = {"states": [tree_map_with_path(restore, state) for state in multi.state["states"]]}
