"""One training step, compiled. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.model.distributed import World
from mlx_moe.model.loss import cross_entropy
from mlx_moe.model.moe import Routing, auxiliary_loss, entropy, load
from mlx_moe.model.optimizers import update_groups
from mlx_moe.model.transformer import Transformer
from mlx_moe.parameters import optimizer_groups


class CompiledStep(NamedTuple):
    """A step as a whole, where that fits; and in pieces. Losses are (loss, cross entropy, router entropies…)."""

    # Tokens -> losses, load (L, E), gradients' norm.
    whole: Callable[[mx.array], tuple[mx.array, mx.array, mx.array]] | None
    load: Callable[[mx.array], mx.array]  # tokens -> load (L, E)
    # Tokens, load (or none, (0, 0): their own), scale of the loss -> losses, load, gradients.
    gradients: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array, Any]]
    update: Callable[[Any, mx.array], mx.array]  # gradients, what to multiply them by -> their norm


def compile_step(
    model: Transformer,
    optimizer: optim.MultiOptimizer,
    config: ModelConfig,
    optimizer_config: OptimizerConfig,
    world: World,
    dtype: mx.Dtype,
) -> CompiledStep:
    """Bound to the model's and the optimizer's present state, which it changes."""
    state = [model.state, optimizer.state, mx.random.state]
    groups = update_groups(config, optimizer_config)

    def losses(tokens_BT1: mx.array, load_LE: mx.array | None, scale: mx.array | None) -> tuple[mx.array, ...]:
        x_BTD, routings = model(tokens_BT1[:, :-1], dtype=dtype, hidden_only=True)
        loss = tokens_loss = cross_entropy(x_BTD, model.head, tokens_BT1[:, 1:], needs_gradients=True)
        if config.moe:
            load_LE = world.mean(loads_of(routings)) if load_LE is None else load_LE
            for routing, load_E in zip(routings, load_LE, strict=True):
                loss = loss + auxiliary_loss(routing, load_E, config.moe)
        reported = mx.stack([loss, tokens_loss, *map(entropy, routings)])
        return loss if scale is None else loss * scale, reported, mx.zeros((0, 0)) if load_LE is None else load_LE

    differentiate = nn.value_and_grad(model, losses)

    def clip(gradients: Any, factor: mx.array | float) -> tuple[mx.array, mx.array]:
        norm = norm_of(gradients) * factor
        return norm, factor * mx.minimum(optimizer_config.max_grad_norm / (norm + 1e-6), 1.0)

    def update(gradients: Any, factor: mx.array | float) -> mx.array:
        gradients = nn.average_gradients(gradients)
        norm, factor = clip(gradients, factor)
        optimizer.update(model, tree_map(lambda gradient: gradient * factor, gradients))
        return norm

    clip_alone = mx.compile(clip)

    def updating(part: optim.Optimizer) -> Callable[[Any, mx.array], None]:
        def updated(gradients: Any, factor: mx.array) -> None:
            part.update(model, tree_map(lambda gradient: gradient * factor, gradients))

        return mx.compile(updated, inputs=state, outputs=state)

    parts = [(group.names, updating(part)) for group, part in zip(groups, optimizer.optimizers, strict=True)]

    def update_in_parts(gradients: Any, factor: mx.array) -> mx.array:
        gradients = nn.average_gradients(gradients)
        norm, factor = clip_alone(gradients, factor)
        named = dict(tree_flatten(gradients))
        for names, update_part in parts:
            update_part(tree_unflatten([(name, named[name]) for name in names]), factor)
            mx.eval(model.state, optimizer.state)  # what this part replaced is freed before the next begins
        return norm

    @partial(mx.compile, inputs=state, outputs=state)
    def whole(tokens_BT1: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        (_, reported, load_LE), gradients = differentiate(tokens_BT1, None, None)
        return reported, load_LE, update(gradients, 1.0)

    @partial(mx.compile, inputs=state, outputs=[mx.random.state])
    def load_in(tokens_BT1: mx.array) -> mx.array:
        return loads_of(model(tokens_BT1[:, :-1], dtype=dtype, hidden_only=True)[1])

    @partial(mx.compile, inputs=state, outputs=[model.state, mx.random.state])
    def gradients_in(tokens_BT1: mx.array, load_LE: mx.array, scale: mx.array) -> tuple[mx.array, mx.array, Any]:
        (_, reported, load_LE), gradients = differentiate(tokens_BT1, load_LE if load_LE.size else None, scale)
        return reported, load_LE, gradients

    if len(groups) > len(optimizer_groups(config, optimizer_config)):
        return CompiledStep(None, load_in, gradients_in, update_in_parts)
    return CompiledStep(whole, load_in, gradients_in, mx.compile(update, inputs=state, outputs=state))


def loads_of(routings: Sequence[Routing]) -> mx.array:
    return mx.stack([load(routing) for routing in routings]) if routings else mx.zeros((0, 0))


def norm_of(gradients: Any) -> mx.array:
    # One axis first: on CPU, one sum over a million squares is wrong in the third digit.
    squares = [mx.square(gradient).sum(axis=-1).sum() for _, gradient in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())
