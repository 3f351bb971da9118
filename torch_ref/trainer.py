"""A model on PyTorch, and its training step. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

import resource
import sys
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import Device
from mlx_moe.parameters import Arrays, LazyWeights, Weights, optimizer_table, parameter_table
from mlx_moe.precision import choose_precision, without_loss_scale
from mlx_moe.training.backend import Logits, RoutedLogits, Tokens, local_batch
from mlx_moe.training.step_settings import StepSettings, required
from mlx_moe.transfer.plan import Plan, TensorPlan, carry_moments
from torch_ref import place_compiler_cache
from torch_ref.device import choose_device, has_bf16, to_device, torch_device
from torch_ref.distributed import connect, full_tensor, shard, to_numpy
from torch_ref.loss import cross_entropy
from torch_ref.moe import expert_loads
from torch_ref.optimizers import load_optimizer_state, state_tensors
from torch_ref.step import TrainingStep
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
        self._optimizer_config, self._engine = optimizer, engine
        with torch.device("meta"):
            self._model = Transformer(config)
        # NumPy's arrays belong to the caller; tensors come from a transfer, which made them for this model.
        tensors = {
            name: torch.as_tensor(array).to(self._torch_device, copy=not isinstance(array, Tensor))
            for name, array in weights.items()
        }
        self._model.load_state_dict(tensors, assign=True)
        is_trained = {parameter.name: parameter.is_trained for parameter in parameter_table(config)}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(is_trained[name])
        self._model.activation_checkpointing = engine.activation_checkpointing
        if engine.compile:
            place_compiler_cache()
            self._model.compile_blocks()
        shard(self._model, self.world, engine.strategy)

    @property
    def module(self) -> Transformer:
        return self._model

    @cached_property
    def step(self) -> TrainingStep:
        """The training step with its optimizer, built on first use: PyTorch loads its compiler for them."""
        settings = StepSettings(self.config, required(self._optimizer_config), self._engine, self.precision.name)
        return TrainingStep(self._model, settings, self.world, self.device)

    @torch.no_grad()
    def loss(self, tokens_BT1: Tokens) -> float:
        self._model.eval()
        tokens = to_device(local_batch(self.world, tokens_BT1), self.device)
        x_BTD, _ = self._model(tokens[:, :-1], hidden_only=True)
        return self.world.mean(cross_entropy(x_BTD, self._model.head, tokens[:, 1:])).item()

    @torch.no_grad()
    def logits(self, tokens_BT: Tokens) -> Logits:
        self._model.eval()
        logits_BTV, _ = self._model(to_device(tokens_BT, self.device))
        return logits_BTV.float().cpu().numpy()

    @torch.no_grad()
    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        self._model.eval()
        forced = {}
        if experts_LNK is not None:
            experts = torch.from_numpy(experts_LNK).to(self._torch_device)
            forced = dict(zip(self.config.expert_layers, experts, strict=True))
        logits_BTV, routings = self._model(to_device(tokens_BT, self.device), experts=forced)
        found = [(routing.logits_NE.cpu().numpy(), routing.experts_NK.cpu().numpy()) for routing in routings]
        return RoutedLogits.stack(logits_BTV.float().cpu().numpy(), found)

    @torch.no_grad()
    def module_output(self, name: str, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        self._model.eval()
        tensors = [torch.from_numpy(array).to(self._torch_device) for array in inputs]
        output = self._model.get_submodule(name)(*tensors)
        return (output[0] if isinstance(output, tuple) else output).cpu().numpy()

    @torch.no_grad()
    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        self._model.eval()
        _, routings = self._model(to_device(tokens_BT, self.device), hidden_only=True)
        return expert_loads(routings).cpu().numpy() if routings else None

    def decoder(self) -> Decoder:
        self._model.eval()
        return Decoder(self._model, self.device)

    def weights(self) -> Arrays:
        return {name: to_numpy(tensor) for name, tensor in self._model.state_dict().items()}

    def optimizer_state(self) -> Arrays:
        state = {name: to_numpy(tensor) for name, tensor in state_tensors(self.step.optimizer).items()}
        return state | self.step.loss_scale.arrays()

    def lazy_state(self) -> tuple[Weights, Weights]:
        if self.world.size > 1 or self.step.loss_scale.is_dynamic:
            return self.weights(), self.optimizer_state()
        return lazy(self._model.state_dict()), lazy(state_tensors(self.step.optimizer))

    def load_optimizer_state(self, state: Arrays) -> None:
        self.step.loss_scale.load(state)
        load_optimizer_state(self.step.optimizer, self.step.settings, without_loss_scale(state))

    def apply_transfer(self, plan: Plan, carry: bool = False) -> Trainer:
        source = {name: full_tensor(tensor) for name, tensor in self._model.state_dict().items()}
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


def apply_plan(plan: TensorPlan, source: dict[str, Tensor]) -> Tensor:
    """Return the target tensor; it shares no memory with the source. The plan computes pads and draws."""
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


def lazy(arrays: dict[str, Tensor]) -> Weights:
    """Return arrays that are fetched from the device when they are asked for."""
    return LazyWeights(arrays, lambda name: to_numpy(arrays[name]))
