"""A model on MLX, and its training step. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import Device
from mlx_moe.errors import InputError
from mlx_moe.model.device import choose_device, has_bf16, keep_freed_buffers, on_its_device, running_on
from mlx_moe.model.distributed import connect
from mlx_moe.model.loss import cross_entropy
from mlx_moe.model.moe import expert_loads
from mlx_moe.model.optimizers import load_optimizer_state, state_tensors
from mlx_moe.model.step import TrainingStep, compiled
from mlx_moe.model.transformer import Decoder, Transformer
from mlx_moe.parameters import Arrays, LazyWeights, Weights, optimizer_table, parameter_table
from mlx_moe.precision import choose_precision, without_loss_scale
from mlx_moe.training.backend import Logits, RoutedLogits, Tokens, local_batch
from mlx_moe.training.step_settings import StepSettings, required
from mlx_moe.transfer.plan import Plan, TensorPlan, carry_moments


class Trainer:
    """`mlx_moe.training.backend.Trainer` on MLX."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights | dict[str, mx.array],
        optimizer: OptimizerConfig | None = None,
        device: str | Device = "auto",
        engine: EngineConfig = EngineConfig(),
    ):
        if engine.strategy != "ddp":
            raise InputError(f"engine.strategy {engine.strategy!r}: mlx knows ddp only; take that, or --backend torch")
        self.config = config
        self.world = connect()
        self.device = choose_device(device)
        keep_freed_buffers()
        self.precision = choose_precision(engine.precision, self.device, has_bf16(self.device))
        self._optimizer_config, self._engine = optimizer, engine
        with running_on(self.device):
            self._model = self._build(weights)
        state = [self._model.state]
        self._loss = compiled(self._loss_of, self._model, state)
        self._logits = compiled(lambda tokens_BT: self._model(tokens_BT)[0], self._model, state)

    def _build(self, weights: Weights | dict[str, mx.array]) -> Transformer:
        model = Transformer(self.config)
        # A transfer leaves arrays with their axes in another order, and products round by how these lie in memory.
        model.load_weights([(name, mx.contiguous(mx.array(array))) for name, array in weights.items()])
        model.activation_checkpointing = self._engine.activation_checkpointing
        mx.eval(model.parameters())
        if self.config.lora:
            self._freeze(model)
        return model

    def _freeze(self, model: Transformer) -> None:
        """Take gradients and moments from all parameters that are not trained."""
        model.freeze()
        modules = dict(model.named_modules())
        for parameter in parameter_table(self.config):
            if parameter.is_trained:
                module, _, name = parameter.name.rpartition(".")
                modules[module].unfreeze(recurse=False, keys=name)

    @property
    def module(self) -> Transformer:
        return self._model

    @cached_property
    def step(self) -> TrainingStep:
        """The training step with its optimizer, built on first use: inference needs neither."""
        settings = StepSettings(self.config, required(self._optimizer_config), self._engine, self.precision.name)
        with running_on(self.device):
            return TrainingStep(self._model, settings, self.world, self.device)

    @on_its_device
    def loss(self, tokens_BT1: Tokens) -> float:
        self._model.eval()
        tokens = mx.array(local_batch(self.world, tokens_BT1))
        return _float(self.world.mean(self._loss(tokens)))

    def _loss_of(self, tokens_BT1: mx.array) -> mx.array:
        x_BTD, _ = self._model(tokens_BT1[:, :-1], hidden_only=True)
        return cross_entropy(x_BTD, self._model.head, tokens_BT1[:, 1:])

    @on_its_device
    def logits(self, tokens_BT: Tokens) -> Logits:
        self._model.eval()
        return np.array(self._logits(mx.array(tokens_BT)).astype(mx.float32))

    @on_its_device
    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        self._model.eval()
        forced = {}
        if experts_LNK is not None:
            forced = dict(zip(self.config.expert_layers, mx.array(experts_LNK, mx.int32), strict=True))
        logits_BTV, routings = self._model(mx.array(tokens_BT), experts=forced)
        found = [(np.array(routing.logits_NE), np.array(routing.experts_NK)) for routing in routings]
        return RoutedLogits.stack(np.array(logits_BTV.astype(mx.float32)), found)

    @on_its_device
    def module_output(self, name: str, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        self._model.eval()
        output = dict(self._model.named_modules())[name](*(mx.array(array) for array in inputs))
        return np.array(output[0] if isinstance(output, tuple) else output)

    @on_its_device
    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        self._model.eval()
        _, routings = self._model(mx.array(tokens_BT), hidden_only=True)
        return np.array(expert_loads(routings)) if routings else None

    def decoder(self) -> Decoder:
        self._model.eval()
        return Decoder(self._model, self.device)

    @on_its_device
    def weights(self) -> Arrays:
        return {name: np.array(array) for name, array in tree_flatten(self._model.parameters())}

    @on_its_device
    def optimizer_state(self) -> Arrays:
        state = {name: np.array(array) for name, array in state_tensors(self.step.optimizer).items()}
        return state | self.step.loss_scale.arrays()

    @on_its_device
    def lazy_state(self) -> tuple[Weights, Weights]:
        if self.step.loss_scale.is_dynamic:
            return self.weights(), self.optimizer_state()
        weights, state = dict(tree_flatten(self._model.parameters())), state_tensors(self.step.optimizer)
        return lazy(weights), lazy(state)

    @on_its_device
    def load_optimizer_state(self, state: Arrays) -> None:
        self.step.loss_scale.load(state)
        load_optimizer_state(self.step.optimizer, self.step.settings, without_loss_scale(state))

    @on_its_device
    def apply_transfer(self, plan: Plan, carry: bool = False) -> Trainer:
        source = dict(tree_flatten(self._model.parameters()))
        weights = {tensor.target: apply_plan(tensor, source) for tensor in plan.tensors}
        trainer = Trainer(plan.target_config, weights, self._optimizer_config, self.device, self._engine)
        if carry:
            kept = optimizer_table(plan.target_config, required(self._optimizer_config))
            trainer.load_optimizer_state(carry_moments(plan, self.optimizer_state(), kept.keys()))
        return trainer

    def peak_memory_bytes(self) -> int:
        return mx.get_peak_memory()


def apply_plan(plan: TensorPlan, source: dict[str, mx.array]) -> mx.array:
    """Return the target tensor. The plan computes pads and draws, once for both backends."""
    if plan.source is None:
        return mx.array(plan.fresh())
    if plan.draw is not None:
        return mx.array(plan.drawn(np.array(source[plan.source])))
    array = source[plan.source]
    if plan.new_axis:
        array = mx.moveaxis(mx.unflatten(array, plan.cut_axis, (plan.n_parts, -1)), plan.cut_axis, 0)
    for pad in plan.pads:
        array = mx.concatenate([array, mx.array(pad.rows(np.array(array)))], axis=pad.axis)
    for axis_map in plan.maps:
        array = mx.take(array, mx.array(axis_map.index), axis=axis_map.axis)
        if axis_map.scale is not None:
            scale = mx.array(axis_map.scale.astype(np.float32))
            array = array * scale.reshape([-1 if axis == axis_map.axis else 1 for axis in range(array.ndim)])
    return array


def lazy(arrays: dict[str, mx.array]) -> Weights:
    """Return arrays that are fetched from the device when they are asked for."""
    return LazyWeights(arrays, lambda name: np.array(arrays[name]))


def _float(scalar: mx.array) -> float:
    return float(np.array(scalar))
