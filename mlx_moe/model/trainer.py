"""The model, AdamW and one compiled step, on MLX. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.model.attention import KVCache
from mlx_moe.model.elementwise import logsumexp
from mlx_moe.model.moe import Routing, auxiliary_loss, load
from mlx_moe.model.transformer import Transformer
from mlx_moe.parameters import Arrays, table
from mlx_moe.training.backend import Logits, RoutedLogits, StepMetrics, Tokens
from mlx_moe.transfer.plan import Plan, TensorPlan, carry_moments

CACHE_LIMIT_BYTES = 2 << 30  # freed buffers that the allocator may keep


class Trainer:
    """`mlx_moe.training.backend.Trainer` on MLX."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        weights: Arrays | dict[str, mx.array],
        device: str = "auto",
    ):
        self.config = config
        self.device = _choose_device(device)
        self._optimizer_config = optimizer
        self._model = Transformer(config)
        self._model.load_weights([(name, mx.array(array)) for name, array in weights.items()])
        mx.eval(self._model.parameters())
        self._optimizer = _adamw(config, optimizer)
        self._optimizer.init(self._model.trainable_parameters())
        self._step = self._compile_step()
        self._logits = mx.compile(lambda tokens_BT: self._model(tokens_BT)[0], inputs=[self._model.state])
        self._in_flight: mx.array | None = None

    def step(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        self._model.train()
        if self.config.dropout:
            mx.random.seed(dropout_seed)
        self._optimizer.learning_rate = learning_rate
        results = self._step(mx.array(tokens_BT1))
        mx.async_eval(results, self._model.state, self._optimizer.state)
        if self._in_flight is not None:
            mx.eval(self._in_flight)  # never more than one step ahead of the device
        self._in_flight = results[0]

        def fetch() -> StepMetrics:
            loss, cross_entropy, grad_norm, load_LE = results
            expert_load_LE = np.array(load_LE) if load_LE.size else None
            return StepMetrics(_float(loss), _float(cross_entropy), _float(grad_norm), expert_load_LE)

        return fetch

    def loss(self, tokens_BT1: Tokens) -> float:
        self._model.eval()
        tokens = mx.array(tokens_BT1)
        return _float(_cross_entropy(self._logits(tokens[:, :-1]), tokens[:, 1:]))

    def logits(self, tokens_BT: Tokens) -> Logits:
        self._model.eval()
        return np.array(self._logits(mx.array(tokens_BT)).astype(mx.float32))

    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        self._model.eval()
        forced = None if experts_LNK is None else [mx.array(experts_NK, mx.int32) for experts_NK in experts_LNK]
        logits_BTV, routings = self._model(mx.array(tokens_BT), experts=forced)
        router_logits_LNE = [np.array(routing.logits_NE) for routing in routings]
        chosen_LNK = [np.array(routing.experts_NK, np.int64) for routing in routings]
        return RoutedLogits(np.array(logits_BTV.astype(mx.float32)), np.array(router_logits_LNE), np.array(chosen_LNK))

    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        self._model.eval()
        _, routings = self._model(mx.array(tokens_BT))
        return np.array(_loads(routings)) if routings else None

    def decoder(self) -> Decoder:
        self._model.eval()
        return Decoder(self._model)

    def weights(self) -> Arrays:
        return {name: np.array(array) for name, array in tree_flatten(self._model.parameters())}

    def optimizer_state(self) -> Arrays:
        arrays: Arrays = {}
        for state in self._optimizer.state["states"]:
            for path, array in tree_flatten(state):
                name, _, moment = path.rpartition(".")
                if moment in ("m", "v"):
                    arrays[f"{moment}.{name}"] = np.array(array)
                elif path == "step":
                    arrays["step"] = np.array(array, dtype=np.float32)
        return arrays

    def load_optimizer_state(self, state: Arrays) -> None:
        def restore(path: str, value: mx.array) -> mx.array:
            name, _, moment = path.rpartition(".")
            if path == "step":
                return mx.array(int(state["step"]), dtype=value.dtype)
            return mx.array(state[f"{moment}.{name}"]) if moment in ("m", "v") else value

        states = [tree_map_with_path(restore, group) for group in self._optimizer.state["states"]]
        self._optimizer.state = {"states": states}
        self._step = self._compile_step()  # the old one is bound to the old state

    def transferred(self, plan: Plan, carry: bool = False) -> Trainer:
        source = dict(tree_flatten(self._model.parameters()))
        weights = {tensor.target: apply_plan(tensor, source) for tensor in plan.tensors}
        trainer = Trainer(plan.target_config, self._optimizer_config, weights, self.device)
        if carry:
            trainer.load_optimizer_state(carry_moments(plan, self.optimizer_state(), trainer.optimizer_state().keys()))
        return trainer

    def peak_memory_bytes(self) -> int:
        return mx.get_peak_memory()

    def _compile_step(self) -> Callable[[mx.array], tuple[mx.array, mx.array, mx.array, mx.array]]:
        model, optimizer, config = self._model, self._optimizer, self.config
        state = [model.state, optimizer.state, mx.random.state]

        def losses(tokens_BT1: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            logits_BTV, routings = model(tokens_BT1[:, :-1])
            cross_entropy = _cross_entropy(logits_BTV, tokens_BT1[:, 1:])
            loss = cross_entropy
            if config.moe:
                loss = loss + sum(auxiliary_loss(routing, config.moe) for routing in routings)
            return loss, cross_entropy, _loads(routings)

        @partial(mx.compile, inputs=state, outputs=state)
        def step(tokens_BT1: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
            (loss, cross_entropy, load_LE), gradients = nn.value_and_grad(model, losses)(tokens_BT1)
            gradients, grad_norm = optim.clip_grad_norm(gradients, self._optimizer_config.max_grad_norm)
            optimizer.update(model, gradients)
            return loss, cross_entropy, grad_norm, load_LE

        return step


class Decoder:
    """`mlx_moe.training.backend.Decoder` on MLX."""

    def __init__(self, model: Transformer):
        self._model = model
        self._cache = [KVCache() for _ in model.layers]

    @property
    def length(self) -> int:
        return self._cache[0].length

    def __call__(self, tokens_BT: Tokens) -> NDArray[np.float32]:
        logits_BTV, _ = self._model(mx.array(tokens_BT), self._cache)
        return np.array(logits_BTV[:, -1].astype(mx.float32))


def apply_plan(plan: TensorPlan, source: dict[str, mx.array]) -> mx.array:
    """The target tensor, by MLX. Pads are computed by the plan, once for both backends."""
    if plan.source is None:
        return mx.array(plan.fresh())
    array = source[plan.source][None] if plan.new_axis else source[plan.source]
    if plan.pad is not None:
        array = mx.concatenate([array, mx.array(plan.pad.rows(np.array(array)))], axis=plan.pad.axis)
    for axis_map in plan.maps:
        array = mx.take(array, mx.array(axis_map.index), axis=axis_map.axis)
        if axis_map.scale is not None:
            scale = mx.array(axis_map.scale.astype(np.float32))
            array = array * scale.reshape([-1 if axis == axis_map.axis else 1 for axis in range(array.ndim)])
    return array


def _adamw(config: ModelConfig, optimizer: OptimizerConfig) -> optim.MultiOptimizer:
    matrices = {parameter.name for parameter in table(config) if parameter.is_matrix}

    def adamw(weight_decay: float) -> optim.AdamW:
        betas = list(optimizer.betas)
        return optim.AdamW(0.0, betas, optimizer.eps, weight_decay, bias_correction=True)

    groups = [adamw(optimizer.weight_decay), adamw(0.0)]
    return optim.MultiOptimizer(groups, [lambda name, _: name in matrices])


def _cross_entropy(logits_BTV: mx.array, targets_BT: mx.array) -> mx.array:
    logits_BTV = logits_BTV.astype(mx.float32)
    chosen_BT = mx.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1).squeeze(-1)
    return (logsumexp(logits_BTV) - chosen_BT).mean()


def _float(scalar: mx.array) -> float:
    return float(np.array(scalar))


def _loads(routings: list[Routing]) -> mx.array:
    return mx.stack([load(routing) for routing in routings]) if routings else mx.zeros((0, 0))


def _choose_device(requested: str) -> str:
    """`Metal`, `CUDA` or `CPU`; sets MLX's default device and bounds its allocator's cache."""
    gpu = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else None
    if requested not in ("auto", "cpu", "gpu", "Metal", "CUDA", "CPU"):
        raise InputError(f"--device {requested!r}: mlx knows auto, cpu and gpu")
    if requested == "gpu" and gpu is None:
        raise InputError("--device gpu: mlx finds neither Metal nor CUDA; take --device cpu")
    use_gpu = gpu is not None and requested.lower() != "cpu"
    mx.set_default_device(mx.gpu if use_gpu else mx.cpu)
    mx.set_cache_limit(CACHE_LIMIT_BYTES)
    return gpu if use_gpu and gpu else "CPU"
