"""A training step: losses → gradients → clip → update.

B batch, T time, V vocabulary, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlx_moe.device import Device
from mlx_moe.precision import LossScale
from mlx_moe.training.backend import StepMetrics, Tokens, local_batch
from mlx_moe.training.step_settings import StepSettings, step_metrics
from torch_ref.device import DTYPES, to_device
from torch_ref.distributed import ProcessGroup, average_gradients, to_numpy
from torch_ref.loss import cross_entropy
from torch_ref.moe import auxiliary_loss, expert_loads, router_entropy
from torch_ref.optimizers import build_optimizer
from torch_ref.transformer import Transformer

Array = Tensor
Gradients = list[nn.Parameter]  # PyTorch keeps each gradient in its parameter


class StepOutput(NamedTuple):
    """A step's results, on the device; `losses` (2 + L,): loss, cross entropy, router entropies."""

    losses: Array
    load_LE: Array | None
    grad_norm: Array


class TrainingStep:
    """A model's training step with its optimizer and loss scale, whose states it changes."""

    def __init__(self, model: Transformer, settings: StepSettings, world: ProcessGroup, device: Device):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = build_optimizer(trained, settings, world)
        self.loss_scale = LossScale.of(settings.precision)
        self.settings, self.device, self._model, self._world = settings, device, model, world
        self._dtype = DTYPES[settings.precision]
        self._parallel_model = average_gradients(model, world, settings.engine.strategy)
        self._trained = list(trained.values())

    def __call__(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        """Train on a global batch (B, T + 1). Calling the result waits for the device and returns the metrics."""
        if not self._model.training:  # walking through all modules takes a small model longer than its norms
            self._model.train()
        self.optimizer.learning_rate = learning_rate
        parts = to_device(local_batch(self._world, tokens_BT1), self.device).chunk(self.settings.n_parts)
        seeds = self.settings.part_seeds(dropout_seed, self._world.rank)
        return partial(self.metrics, self._train_on_parts(parts, seeds))

    def _train_on_parts(self, parts: Sequence[Array], seeds: Sequence[int]) -> StepOutput:
        load_LE = self._expert_load_of_batch(parts, seeds) if self.settings.model.moe and len(parts) > 1 else None
        loss_scale = self.loss_scale.scale
        gradients, losses = self._trained, list[Array]()
        for part, seed in zip(parts, seeds, strict=True):
            self._seed_dropout(seed)
            with self._without_averaging() if part is not parts[-1] else nullcontext():
                gradients, part_losses, load_LE = self.gradients(part, load_LE, loss_scale / len(parts))
            losses.append(part_losses)
        gradients, norm = self.clip(gradients, loss_scale)
        if not self.loss_scale.is_dynamic or self.loss_scale.accepts(float(to_numpy(norm))):
            self.update(gradients)
        for parameter in gradients:
            parameter.grad = None  # frees memory for evaluating and saving
        return StepOutput(torch.stack(losses).mean(dim=0), load_LE, norm)

    def losses(self, tokens_BT1: Array, load_LE: Array | None) -> tuple[Array, Array, Array | None]:
        """Return the loss with its auxiliary terms (), all reported losses (2 + L,), and the load (L, E) of experts.

        The balance loss uses the load of the whole batch: `load_LE`, or None if `tokens_BT1` are all of it.
        """
        x_BTD, routings = self._parallel_model(tokens_BT1[:, :-1], dtype=self._dtype, hidden_only=True)
        compiled = self.settings.engine.compile
        loss = tokens_loss = cross_entropy(x_BTD, self._model.head, tokens_BT1[:, 1:], compiled)
        if self.settings.model.moe:
            load_LE = self._world.mean(expert_loads(routings)) if load_LE is None else load_LE
            for routing, load_E in zip(routings, load_LE, strict=True):
                loss = loss + auxiliary_loss(routing, load_E, self.settings.model.moe)
        return loss, torch.stack([loss, tokens_loss, *map(router_entropy, routings)]).detach(), load_LE

    def gradients(
        self, tokens_BT1: Array, load_LE: Array | None, scale: Array | float
    ) -> tuple[Gradients, Array, Array | None]:
        """Return the gradients of the loss times `scale`, the reported losses and the load.

        PyTorch adds the gradients to those of the parts before.
        """
        loss, reported, load_LE = self.losses(tokens_BT1, load_LE)
        (loss * scale).backward()
        return self._trained, reported, load_LE

    def clip(self, gradients: Gradients, loss_scale: Array | float) -> tuple[Gradients, Array]:
        """Take the loss scale out of the gradients and bound their norm. Returns them and the norm before, ()."""
        if self.loss_scale.is_dynamic:
            for parameter in gradients:
                assert parameter.grad is not None
                parameter.grad.div_(loss_scale)
        return gradients, nn.utils.clip_grad_norm_(gradients, self.settings.optimizer.max_grad_norm)

    def update(self, gradients: Gradients) -> None:
        """Let each rule update its parameters."""
        self.optimizer.step()

    def metrics(self, output: StepOutput) -> StepMetrics:
        """Wait for the device and return the metrics, means over all processes."""
        losses = to_numpy(self._world.mean(output.losses))
        load_LE = None if output.load_LE is None else to_numpy(output.load_LE)
        return step_metrics(losses, load_LE, float(to_numpy(output.grad_norm)))

    @torch.no_grad()
    def expert_load(self, tokens_BT1: Array) -> Array:
        """Return the share of each layer's assignments that each expert takes in a part of the batch, (L, E)."""
        _, routings = self._model(tokens_BT1[:, :-1], dtype=self._dtype, hidden_only=True)
        return expert_loads(routings)

    def _expert_load_of_batch(self, parts: Sequence[Array], seeds: Sequence[int]) -> Array:
        """Return the load over all parts and processes."""
        found = list[Array]()
        for part, seed in zip(parts, seeds, strict=True):
            self._seed_dropout(seed)
            found.append(self.expert_load(part))
        return self._world.mean(torch.stack(found).mean(dim=0))

    def _seed_dropout(self, seed: int) -> None:
        if self.settings.model.dropout:
            torch.manual_seed(seed)

    def _without_averaging(self) -> AbstractContextManager[None]:
        """Leave gradients to this process: they are averaged once a step, with the last part's."""
        if isinstance(self._parallel_model, DistributedDataParallel):
            return self._parallel_model.no_sync()
        return nullcontext()
