"""One training step, compiled. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mlx_moe.config import ModelConfig
from mlx_moe.model.distributed import World
from mlx_moe.model.loss import cross_entropy
from mlx_moe.model.moe import Routing, auxiliary_loss, entropy, load
from mlx_moe.model.transformer import Transformer


class CompiledStep(NamedTuple):
    """A step as a whole; and in pieces, for a batch in parts. Losses are (loss, cross entropy, router entropies…)."""

    whole: Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]  # tokens -> losses, load (L, E), gradients' norm
    load: Callable[[mx.array], mx.array]  # tokens -> load (L, E)
    gradients: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, Any]]  # tokens, load, scale of the loss
    update: Callable[[Any, mx.array], mx.array]  # gradients, what to multiply them by -> their norm


def compile_step(
    model: Transformer,
    optimizer: optim.MultiOptimizer,
    config: ModelConfig,
    world: World,
    dtype: mx.Dtype,
    max_grad_norm: float,
) -> CompiledStep:
    """Bound to the model's and the optimizer's present state, which it changes."""
    state = [model.state, optimizer.state, mx.random.state]

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

    def update(gradients: Any, factor: mx.array | float) -> mx.array:
        gradients = nn.average_gradients(gradients)
        norm = norm_of(gradients) * factor
        factor = factor * mx.minimum(max_grad_norm / (norm + 1e-6), 1.0)
        optimizer.update(model, tree_map(lambda gradient: gradient * factor, gradients))
        return norm

    @partial(mx.compile, inputs=state, outputs=state)
    def whole(tokens_BT1: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        (_, reported, load_LE), gradients = differentiate(tokens_BT1, None, None)
        return reported, load_LE, update(gradients, 1.0)

    @partial(mx.compile, inputs=state, outputs=[mx.random.state])
    def load_in(tokens_BT1: mx.array) -> mx.array:
        return loads_of(model(tokens_BT1[:, :-1], dtype=dtype, hidden_only=True)[1])

    @partial(mx.compile, inputs=state, outputs=[model.state, mx.random.state])
    def gradients_in(tokens_BT1: mx.array, load_LE: mx.array, scale: mx.array) -> tuple[mx.array, Any]:
        (_, reported, _), gradients = differentiate(tokens_BT1, load_LE, scale)
        return reported, gradients

    return CompiledStep(whole, load_in, gradients_in, mx.compile(update, inputs=state, outputs=state))


def loads_of(routings: Sequence[Routing]) -> mx.array:
    return mx.stack([load(routing) for routing in routings]) if routings else mx.zeros((0, 0))


def norm_of(gradients: Any) -> mx.array:
    # One axis first: on CPU, one sum over a million squares is wrong in the third digit.
    squares = [mx.square(gradient).sum(axis=-1).sum() for _, gradient in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())
