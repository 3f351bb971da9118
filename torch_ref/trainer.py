"""The model, its optimizers and one step, on PyTorch. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import Device
from mlx_moe.parameters import Arrays, Weights, optimizer_table, table
from mlx_moe.precision import LossScale, choose_precision, without_loss_scale
from mlx_moe.storage.tensor_files import StoredWeights
from mlx_moe.training.backend import Logits, RoutedLogits, StepMetrics, Tokens, own_rows, required
from mlx_moe.transfer.plan import Plan, TensorPlan, carry_moments
from torch_ref import place_compiler_cache
from torch_ref.device import DTYPES, choose_device, has_bf16, torch_device
from torch_ref.distributed import connect, distribute, gathered, whole
from torch_ref.loss import cross_entropy
from torch_ref.moe import Routing, auxiliary_loss, entropy, load
from torch_ref.optimizers import build_optimizers, load_optimizer_state, state_tensors
from torch_ref.transformer import Decoder, Transformer


class Trainer:
    """`mlx_moe.training.backend.Trainer` on PyTorch."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights | dict[str, Tensor],
        optimizer: OptimizerConfig | None = None,
        device: str | Device = "auto",
        engine: EngineConfig = EngineConfig(),
    ):
        self.config = config
        self.world = connect()
        self.device = choose_device(device)
        self._torch_device = torch_device(self.device)
        self.precision = choose_precision(engine.precision, self.device, has_bf16(self.device))
        self._dtype = DTYPES[self.precision.name]
        self._loss_scale = LossScale() if self.precision.name == "fp16" else None
        self._optimizer_config, self._engine = optimizer, engine
        with torch.device("meta"):
            self._model = Transformer(config)
        # NumPy's arrays belong to the caller; tensors come from a transfer, which made them for this model.
        tensors = {
            name: torch.as_tensor(array).to(self._torch_device, copy=not isinstance(array, Tensor))
            for name, array in weights.items()
        }
        self._model.load_state_dict(tensors, assign=True)
        is_trained = {parameter.name: parameter.is_trained for parameter in table(config)}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(is_trained[name])
        self._model.activation_checkpointing = engine.activation_checkpointing
        if engine.compile:
            place_compiler_cache()
            self._model.compile_blocks()
        self._trained = distribute(self._model, self.world, engine.strategy)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    @cached_property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Built on first use: the first of a process loads PyTorch's compiler."""
        named = self._model.named_parameters()
        config = required(self._optimizer_config)
        return build_optimizers(named, self.config, config, self.world, self._engine.strategy)

    @property
    def module(self) -> Transformer:
        return self._model

    def step(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        if not self._model.training:  # walking through all modules takes a small model longer than its norms
            self._model.train()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        n_parts = self._engine.accumulation_steps
        parts = self._tensor(own_rows(self.world, tokens_BT1)).chunk(n_parts)
        seeds = [dropout_seed + self.world.rank * n_parts + part for part in range(n_parts)]
        load_LE = self._load_of_all(parts, seeds) if self.config.moe and n_parts > 1 else None
        scale = (self._loss_scale.scale if self._loss_scale else 1.0) / n_parts
        losses = []
        for part, seed in zip(parts, seeds, strict=True):
            with self._gradients_stay_here() if part is not parts[-1] else nullcontext():
                loss, tokens_loss, load_LE, entropy_L = self._losses(part, seed, load_LE)
                (loss * scale).backward()
            losses.append(torch.cat([torch.stack([loss, tokens_loss]), entropy_L]).detach())
        grad_norm = self._update()
        for parameter in self._parameters:
            parameter.grad = None  # what evaluates or saves next has its room

        def fetch() -> StepMetrics:
            loss, tokens_loss, *entropy_L = self.world.mean(torch.stack(losses).mean(dim=0)).tolist()
            norm = float(whole(grad_norm))
            if load_LE is None:
                return StepMetrics(loss, tokens_loss, norm)
            return StepMetrics(loss, tokens_loss, norm, load_LE.cpu().numpy(), np.array(entropy_L, np.float32))

        return fetch

    def _losses(
        self, tokens_BT1: Tensor, seed: int, load_LE: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(loss, cross entropy, each layer's load and router entropy), for a part of a batch; with the whole's load."""
        self._seed_dropout(seed)
        x_BTD, routings = self._trained(tokens_BT1[:, :-1], dtype=self._dtype, hidden_only=True)
        loss = tokens_loss = cross_entropy(x_BTD, self._model.head, tokens_BT1[:, 1:], self._engine.compile)
        if self.config.moe is None:
            return loss, tokens_loss, None, loss.new_zeros(0)
        if load_LE is None:
            load_LE = self.world.mean(_loads(routings))
        for routing, load_E in zip(routings, load_LE, strict=True):
            loss = loss + auxiliary_loss(routing, load_E, self.config.moe)
        return loss, tokens_loss, load_LE, torch.stack([entropy(routing) for routing in routings])

    @torch.no_grad()
    def _load_of_all(self, parts: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Each layer's load over all parts and processes: balance is asked of the batch, not of each part."""
        loads = []
        for part, seed in zip(parts, seeds, strict=True):
            self._seed_dropout(seed)
            _, routings = self._model(part[:, :-1], dtype=self._dtype, hidden_only=True)
            loads.append(_loads(routings))
        return self.world.mean(torch.stack(loads).mean(dim=0))

    def _update(self) -> Tensor:
        """Clip the gradients and let the optimizers step, unless a scaled gradient overflowed; returns their norm."""
        if self._loss_scale:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad.div_(self._loss_scale.scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, required(self._optimizer_config).max_grad_norm)
        if self._loss_scale:
            overflowed = not math.isfinite(float(whole(grad_norm)))
            self._loss_scale.update(overflowed)
            if overflowed:
                return grad_norm
        for optimizer in self._optimizers:
            optimizer.step()
        return grad_norm

    def _gradients_stay_here(self) -> AbstractContextManager[None]:
        """Processes average their gradients once a step, with the last part."""
        if isinstance(self._trained, DistributedDataParallel):
            return self._trained.no_sync()
        return nullcontext()

    def _seed_dropout(self, seed: int) -> None:
        if self.config.dropout:
            torch.manual_seed(seed)

    @torch.no_grad()
    def loss(self, tokens_BT1: Tokens) -> float:
        self._model.eval()
        tokens = self._tensor(own_rows(self.world, tokens_BT1))
        x_BTD, _ = self._model(tokens[:, :-1], hidden_only=True)
        return self.world.mean(cross_entropy(x_BTD, self._model.head, tokens[:, 1:])).item()

    @torch.no_grad()
    def logits(self, tokens_BT: Tokens) -> Logits:
        self._model.eval()
        logits_BTV, _ = self._model(self._tensor(tokens_BT))
        return logits_BTV.float().cpu().numpy()

    @torch.no_grad()
    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        self._model.eval()
        forced = {}
        if experts_LNK is not None:
            experts = torch.from_numpy(experts_LNK).to(self._torch_device)
            forced = dict(zip(self.config.expert_layers, experts, strict=True))
        logits_BTV, routings = self._model(self._tensor(tokens_BT), experts=forced)
        router_logits_LNE = [routing.logits_NE.cpu().numpy() for routing in routings]
        chosen_LNK = [routing.experts_NK.cpu().numpy() for routing in routings]
        return RoutedLogits(logits_BTV.float().cpu().numpy(), np.array(router_logits_LNE), np.array(chosen_LNK))

    @torch.no_grad()
    def module_output(self, name: str, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        self._model.eval()
        tensors = [torch.from_numpy(array).to(self._torch_device) for array in inputs]
        output = self._model.get_submodule(name)(*tensors)
        return (output[0] if isinstance(output, tuple) else output).cpu().numpy()

    @torch.no_grad()
    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        self._model.eval()
        _, routings = self._model(self._tensor(tokens_BT), hidden_only=True)
        return _loads(routings).cpu().numpy() if routings else None

    def decoder(self) -> Decoder:
        self._model.eval()
        return Decoder(self._model, self._torch_device)

    def weights(self) -> Arrays:
        return {name: whole(tensor) for name, tensor in self._model.state_dict().items()}

    def optimizer_state(self) -> Arrays:
        state = {name: whole(tensor) for name, tensor in self._state_tensors().items()}
        return state | (self._loss_scale.arrays() if self._loss_scale else {})

    def stored(self) -> tuple[Weights, Weights]:
        if self.world.size > 1 or self._loss_scale:
            return self.weights(), self.optimizer_state()
        return _as_asked_for(self._model.state_dict()), _as_asked_for(self._state_tensors())

    def _state_tensors(self) -> dict[str, Tensor]:
        named = self._model.named_parameters()
        return state_tensors(self._optimizers, named, self.config, required(self._optimizer_config), self.world)

    def load_optimizer_state(self, state: Arrays) -> None:
        if self._loss_scale:
            self._loss_scale.load(state)
        named, moments = self._model.named_parameters(), without_loss_scale(state)
        load_optimizer_state(self._optimizers, named, self.config, required(self._optimizer_config), moments)

    def transferred(self, plan: Plan, carry: bool = False) -> Trainer:
        source = {name: gathered(tensor) for name, tensor in self._model.state_dict().items()}
        weights = {tensor.target: apply_plan(tensor, source) for tensor in plan.tensors}
        trainer = Trainer(plan.target_config, weights, self._optimizer_config, self.device, self._engine)
        if carry:
            kept = optimizer_table(plan.target_config, required(self._optimizer_config))
            trainer.load_optimizer_state(carry_moments(plan, self.optimizer_state(), kept.keys()))
        return trainer

    def peak_memory_bytes(self) -> int:
        if self._torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _tensor(self, tokens: Tokens) -> Tensor:
        tensor = torch.from_numpy(tokens).long()
        if self._torch_device.type != "cuda":
            return tensor.to(self._torch_device)
        return tensor.pin_memory().to(self._torch_device, non_blocking=True)  # unpinned, it waits for the step before


def apply_plan(plan: TensorPlan, source: dict[str, Tensor]) -> Tensor:
    """The target tensor, by PyTorch; it shares no memory with the source. Pads and draws are the plan's."""
    if plan.source is None:
        return torch.from_numpy(plan.fresh())
    if plan.draw is not None:
        return torch.from_numpy(plan.drawn(source[plan.source].cpu().numpy()))
    tensor = source[plan.source]
    if plan.new_axis:
        tensor = tensor.unflatten(plan.cut_axis, (plan.n_parts, -1)).movedim(plan.cut_axis, 0)
    for pad in plan.pads:
        rows = torch.tensor(pad.rows(tensor.cpu().numpy()), device=tensor.device)
        tensor = torch.cat([tensor, rows], dim=pad.axis)
    for axis_map in plan.maps:
        tensor = tensor.index_select(axis_map.axis, torch.from_numpy(axis_map.index).to(tensor.device))
        if axis_map.scale is not None:
            scale = torch.from_numpy(axis_map.scale.astype(np.float32)).to(tensor.device)
            tensor = tensor * scale.view([-1 if axis == axis_map.axis else 1 for axis in range(tensor.ndim)])
    return tensor.clone() if tensor is source[plan.source] else tensor


def _as_asked_for(tensors: dict[str, Tensor]) -> Weights:
    return StoredWeights(tensors, lambda name: whole(tensors[name]))


def _loads(routings: list[Routing]) -> Tensor:
    return torch.stack([load(routing) for routing in routings])
