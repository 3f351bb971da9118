"""A training step: losses → gradients → clip → update.

B batch, T time, V vocabulary, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_moe.device import Device
from mlx_moe.model.device import DTYPES, running_on
from mlx_moe.model.distributed import ProcessGroup
from mlx_moe.model.loss import cross_entropy
from mlx_moe.model.moe import auxiliary_loss, expert_loads, router_entropy
from mlx_moe.model.optimizers import build_optimizer, update_groups
from mlx_moe.model.transformer import Transformer
from mlx_moe.parameters import optimizer_groups
from mlx_moe.precision import LossScale
from mlx_moe.training.backend import StepMetrics, Tokens, local_batch
from mlx_moe.training.step_settings import StepSettings, step_metrics

Array = mx.array
Gradients = Any  # a tree like the trained parameters


class StepOutput(NamedTuple):
    """A step's results, on the device; `losses` (2 + L,): loss, cross entropy, router entropies."""

    losses: Array
    load_LE: Array | None
    grad_norm: Array


class TrainingStep:
    """A model's training step with its optimizer and loss scale, whose states it changes.

    MLX compiles it as one graph. With accumulated gradients, with a dynamic loss scale and for large models, each of
    its stages is a graph.
    """

    def __init__(self, model: Transformer, settings: StepSettings, world: ProcessGroup, device: Device):
        self.optimizer = build_optimizer(dict(tree_flatten(model.trainable_parameters())), settings)
        self.loss_scale = LossScale.of(settings.precision)
        self.settings, self.device, self._model, self._world = settings, device, model, world
        self._dtype = DTYPES[settings.precision]
        self._compile()
        self._in_flight: Array | None = None

    def __call__(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        """Train on a global batch (B, T + 1). Calling the result waits for the device and returns the metrics."""
        self._model.train()
        with running_on(self.device):
            self.optimizer.learning_rate = learning_rate
            parts = list(mx.split(mx.array(local_batch(self._world, tokens_BT1)), self.settings.n_parts))
            seeds = self.settings.part_seeds(dropout_seed, self._world.rank)
            if self._is_one_graph:
                self._seed_dropout(seeds[0])
                output = StepOutput(*self._one_graph(parts[0]))
            else:
                output = self._train_on_parts(parts, seeds)
            mx.async_eval(output, self._model.state, self.optimizer.state)
            if self._in_flight is not None:
                mx.eval(self._in_flight)  # never more than one step ahead of the device
            self._in_flight = output.losses
        return partial(self.metrics, output)

    def _train_on_parts(self, parts: Sequence[Array], seeds: Sequence[int]) -> StepOutput:
        load_LE = self._expert_load_of_batch(parts, seeds) if self.settings.model.moe and len(parts) > 1 else None
        loss_scale = mx.array(self.loss_scale.scale)
        gradients, losses = None, list[Array]()
        for part, seed in zip(parts, seeds, strict=True):
            self._seed_dropout(seed)
            of_part, part_losses, load_LE = self._gradients_graph(part, load_LE, loss_scale / len(parts))
            gradients = of_part if gradients is None else tree_map(mx.add, gradients, of_part)
            losses.append(part_losses)
            mx.eval(gradients, losses)
        gradients, norm = self._clip_graph(nn.average_gradients(gradients), loss_scale)
        if not self.loss_scale.is_dynamic or self.loss_scale.accepts(float(np.array(norm))):
            self.update(gradients)
        return StepOutput(mx.stack(losses).mean(axis=0), load_LE, norm)

    def _train_in_one_graph(self, tokens_BT1: Array) -> tuple[Array, Array | None, Array]:
        gradients, losses, load_LE = self.gradients(tokens_BT1, None, 1.0)
        gradients, norm = self.clip(nn.average_gradients(gradients), 1.0)
        self.update(gradients)
        return losses, load_LE, norm

    def losses(self, tokens_BT1: Array, load_LE: Array | None) -> tuple[Array, Array, Array | None]:
        """Return the loss with its auxiliary terms (), all reported losses (2 + L,), and the load (L, E) of experts.

        The balance loss uses the load of the whole batch: `load_LE`, or None if `tokens_BT1` are all of it.
        """
        x_BTD, routings = self._model(tokens_BT1[:, :-1], dtype=self._dtype, hidden_only=True)
        loss = tokens_loss = cross_entropy(x_BTD, self._model.head, tokens_BT1[:, 1:], needs_gradients=True)
        if self.settings.model.moe:
            load_LE = self._world.mean(expert_loads(routings)) if load_LE is None else load_LE
            for routing, load_E in zip(routings, load_LE, strict=True):
                loss = loss + auxiliary_loss(routing, load_E, self.settings.model.moe)
        return loss, mx.stack([loss, tokens_loss, *map(router_entropy, routings)]), load_LE

    def gradients(
        self, tokens_BT1: Array, load_LE: Array | None, scale: Array | float
    ) -> tuple[Gradients, Array, Array | None]:
        """Return the gradients of the loss times `scale`, the reported losses and the load."""

        def scaled_loss(tokens_BT1: Array) -> tuple[Array, Array, Array | None]:
            loss, reported, load = self.losses(tokens_BT1, load_LE)
            return loss * scale, reported, load

        (_, reported, load_LE), gradients = nn.value_and_grad(self._model, scaled_loss)(tokens_BT1)
        return gradients, reported, load_LE

    def clip(self, gradients: Gradients, loss_scale: Array | float) -> tuple[Gradients, Array]:
        """Take the loss scale out of the gradients and bound their norm. Returns them and the norm before, ()."""
        norm = global_norm(gradients) / loss_scale
        factor = mx.minimum(self.settings.optimizer.max_grad_norm / (norm + 1e-6), 1.0) / loss_scale
        return tree_map(lambda gradient: gradient * factor, gradients), norm

    def update(self, gradients: Gradients) -> None:
        """Let each rule update its parameters.

        New weights and moments stand beside the old ones until these are freed: a large model is updated in parts.
        """
        named = dict(tree_flatten(gradients))
        for names, update_part in self._updates:
            update_part(tree_unflatten([(name, named[name]) for name in names]))
            if self._is_large:
                mx.eval(self._model.state, self.optimizer.state)

    def metrics(self, output: StepOutput) -> StepMetrics:
        """Wait for the device and return the metrics, means over all processes."""
        with running_on(self.device):
            losses = np.array(self._world.mean(output.losses))
        load_LE = None if output.load_LE is None else np.array(output.load_LE)
        return step_metrics(losses, load_LE, float(np.array(output.grad_norm)))

    def expert_load(self, tokens_BT1: Array) -> Array:
        """Return the share of each layer's assignments that each expert takes in a part of the batch, (L, E)."""
        _, routings = self._model(tokens_BT1[:, :-1], dtype=self._dtype, hidden_only=True)
        return expert_loads(routings)

    def _expert_load_of_batch(self, parts: Sequence[Array], seeds: Sequence[int]) -> Array:
        """Return the load over all parts and processes."""
        found = list[Array]()
        for part, seed in zip(parts, seeds, strict=True):
            self._seed_dropout(seed)
            found.append(self._expert_load_graph(part))
            mx.eval(found)
        return self._world.mean(mx.stack(found).mean(axis=0))

    def _seed_dropout(self, seed: int) -> None:
        if self.settings.model.dropout:
            mx.random.seed(seed)

    def _compile(self) -> None:
        config, optimizer = self.settings.model, self.settings.optimizer
        groups = update_groups(config, optimizer)
        self._is_large = len(groups) > len(optimizer_groups(config, optimizer))
        self._is_one_graph = not (self._is_large or self.settings.n_parts > 1 or self.loss_scale.is_dynamic)
        state = [self._model.state, self.optimizer.state, mx.random.state]

        def graph(function: Callable[..., Any]) -> Callable[..., Any]:
            return compiled(function, self._model, state, writes_state=True)

        self._one_graph = graph(self._train_in_one_graph)
        self._gradients_graph = graph(self.gradients)
        self._expert_load_graph = graph(self.expert_load)
        self._clip_graph = mx.compile(self.clip)
        self._updates: list[tuple[list[str], Callable[[Gradients], None]]] = []
        for group, rule in zip(groups, self.optimizer.optimizers, strict=True):
            update_part = partial(rule.update, self._model)
            self._updates.append((group.names, update_part if self._is_one_graph else graph(update_part)))


def global_norm(gradients: Gradients) -> Array:
    """Return the norm of all gradients together, ()."""
    # One axis first: on CPU, one sum over a million squares is wrong in the third digit.
    squares = [mx.square(gradient).sum(axis=-1).sum() for _, gradient in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())


def compiled(
    function: Callable[..., Any], model: nn.Module, state: list[Any], writes_state: bool = False
) -> Callable[..., Any]:
    """Compile a function of arrays and of `state`, trees of arrays that it reads and, if so said, writes.

    While MLX traces the function, `state` holds placeholders. Where tracing raises, the model's weights and the random
    state of the process are put back.
    """
    graph = mx.compile(function, inputs=state, outputs=state if writes_state else None)
    modules, random_state = model.modules(), _random_state()

    def call(*arguments: Any) -> Any:
        contents, key = [dict(module) for module in modules], random_state[0]
        try:
            return graph(*arguments)
        except BaseException:
            for module, content in zip(modules, contents, strict=True):
                dict.update(module, content)
            high, low = np.array(key).tolist()
            mx.random.seed(high << 32 | low)
            raise

    return call


def _random_state() -> Any:
    return mx.random.state
