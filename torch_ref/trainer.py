"""The model, AdamW and one step, on PyTorch. B batch, T time, V vocabulary, L layers, E experts."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays, table
from mlx_moe.training.backend import Logits, RoutedLogits, StepMetrics, Tokens
from mlx_moe.transfer.plan import Plan, TensorPlan, carry_moments
from torch_ref.attention import KVCache
from torch_ref.moe import Routing, auxiliary_loss, load
from torch_ref.transformer import Transformer


class Trainer:
    """`mlx_moe.training.backend.Trainer` on PyTorch."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        weights: Arrays | dict[str, Tensor],
        device: str = "auto",
    ):
        self.config = config
        self._torch_device = _choose_device(device)
        self.device = {"cuda": "CUDA", "mps": "Metal (MPS)"}.get(self._torch_device.type, "CPU")
        self._optimizer_config = optimizer
        with torch.device("meta"):
            self._model = Transformer(config)
        # NumPy's arrays belong to the caller; tensors come from a transfer, which made them for this model.
        tensors = {
            name: torch.as_tensor(array).to(self._torch_device, copy=not isinstance(array, Tensor))
            for name, array in weights.items()
        }
        self._model.load_state_dict(tensors, assign=True)
        self._optimizer = _adamw(self._model, config, optimizer)

    def step(self, tokens_BT1: Tokens, learning_rate: float, dropout_seed: int) -> Callable[[], StepMetrics]:
        self._model.train()
        if self.config.dropout:
            torch.manual_seed(dropout_seed)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        tokens = self._tensor(tokens_BT1)
        logits_BTV, routings = self._model(tokens[:, :-1])
        cross_entropy = _cross_entropy(logits_BTV, tokens[:, 1:])
        loss = cross_entropy
        if self.config.moe:
            for routing in routings:
                loss = loss + auxiliary_loss(routing, self.config.moe)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self._model.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._optimizer_config.max_grad_norm)
        self._optimizer.step()
        loss, cross_entropy, load_LE = loss.detach(), cross_entropy.detach(), _loads(routings)

        def fetch() -> StepMetrics:
            expert_load_LE = None if load_LE is None else load_LE.cpu().numpy()
            return StepMetrics(loss.item(), cross_entropy.item(), grad_norm.item(), expert_load_LE)

        return fetch

    @torch.no_grad()
    def loss(self, tokens_BT1: Tokens) -> float:
        self._model.eval()
        tokens = self._tensor(tokens_BT1)
        logits_BTV, _ = self._model(tokens[:, :-1])
        return _cross_entropy(logits_BTV, tokens[:, 1:]).item()

    @torch.no_grad()
    def logits(self, tokens_BT: Tokens) -> Logits:
        self._model.eval()
        logits_BTV, _ = self._model(self._tensor(tokens_BT))
        return logits_BTV.float().cpu().numpy()

    @torch.no_grad()
    def routed_logits(self, tokens_BT: Tokens, experts_LNK: NDArray[np.int64] | None = None) -> RoutedLogits:
        self._model.eval()
        forced = None if experts_LNK is None else list(torch.from_numpy(experts_LNK).to(self._torch_device))
        logits_BTV, routings = self._model(self._tensor(tokens_BT), experts=forced)
        router_logits_LNE = [routing.logits_NE.cpu().numpy() for routing in routings]
        chosen_LNK = [routing.experts_NK.cpu().numpy() for routing in routings]
        return RoutedLogits(logits_BTV.float().cpu().numpy(), np.array(router_logits_LNE), np.array(chosen_LNK))

    @torch.no_grad()
    def expert_load(self, tokens_BT: Tokens) -> NDArray[np.float32] | None:
        self._model.eval()
        load_LE = _loads(self._model(self._tensor(tokens_BT))[1])
        return None if load_LE is None else load_LE.cpu().numpy()

    def decoder(self) -> Decoder:
        self._model.eval()
        return Decoder(self._model, self._torch_device)

    def weights(self) -> Arrays:
        return {name: _array(tensor) for name, tensor in self._model.state_dict().items()}

    def optimizer_state(self) -> Arrays:
        arrays: Arrays = {"step": np.zeros((), np.float32)}
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter)  # PyTorch makes it in the first step
            arrays[f"m.{name}"] = _array(state["exp_avg"] if state else torch.zeros_like(parameter))
            arrays[f"v.{name}"] = _array(state["exp_avg_sq"] if state else torch.zeros_like(parameter))
            if state:
                arrays["step"] = _array(state["step"])
        return arrays

    def load_optimizer_state(self, state: Arrays) -> None:
        for name, parameter in self._model.named_parameters():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=self._torch_device),
                "exp_avg": torch.tensor(state[f"m.{name}"], device=self._torch_device),
                "exp_avg_sq": torch.tensor(state[f"v.{name}"], device=self._torch_device),
            }

    def transferred(self, plan: Plan, carry: bool = False) -> Trainer:
        source = self._model.state_dict()
        weights = {tensor.target: apply_plan(tensor, source) for tensor in plan.tensors}
        trainer = Trainer(plan.target_config, self._optimizer_config, weights, self._torch_device.type)
        if carry:
            trainer.load_optimizer_state(carry_moments(plan, self.optimizer_state(), trainer.optimizer_state().keys()))
        return trainer

    def peak_memory_bytes(self) -> int:
        if self._torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _tensor(self, tokens: Tokens) -> Tensor:
        return torch.from_numpy(tokens).to(self._torch_device, torch.int64)


class Decoder:
    """`mlx_moe.training.backend.Decoder` on PyTorch."""

    def __init__(self, model: Transformer, device: torch.device):
        self._model = model
        self._device = device
        self._cache = [KVCache() for _ in model.layers]

    @property
    def length(self) -> int:
        return self._cache[0].length

    @torch.no_grad()
    def __call__(self, tokens_BT: Tokens) -> NDArray[np.float32]:
        tokens = torch.from_numpy(tokens_BT).to(self._device, torch.int64)
        logits_BTV, _ = self._model(tokens, self._cache)
        return logits_BTV[:, -1].float().cpu().numpy()


def apply_plan(plan: TensorPlan, source: dict[str, Tensor]) -> Tensor:
    """The target tensor, by PyTorch; it shares no memory with the source. The plan computes pads, once for both."""
    if plan.source is None:
        return torch.from_numpy(plan.fresh())
    tensor = source[plan.source][None] if plan.new_axis else source[plan.source]
    if plan.pad is not None:
        rows = torch.tensor(plan.pad.rows(tensor.cpu().numpy()), device=tensor.device)
        tensor = torch.cat([tensor, rows], dim=plan.pad.axis)
    for axis_map in plan.maps:
        tensor = tensor.index_select(axis_map.axis, torch.from_numpy(axis_map.index).to(tensor.device))
        if axis_map.scale is not None:
            scale = torch.from_numpy(axis_map.scale.astype(np.float32)).to(tensor.device)
            tensor = tensor * scale.view([-1 if axis == axis_map.axis else 1 for axis in range(tensor.ndim)])
    return tensor.clone() if tensor is source[plan.source] else tensor


def _adamw(model: Transformer, config: ModelConfig, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    parameters = dict(model.named_parameters())
    matrices = {parameter.name for parameter in table(config) if parameter.is_matrix}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in parameters if name in matrices]},
        {"params": [parameters[name] for name in parameters if name not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay, fused=True
    )


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


def _loads(routings: list[Routing]) -> Tensor | None:
    return torch.stack([load(routing) for routing in routings]).detach() if routings else None


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy().copy()


def _choose_device(requested: str) -> torch.device:
    """CUDA where there is one, else the CPU; Apple's MPS on request."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if requested not in ("cpu", "gpu", "cuda", "mps"):
        raise InputError(f"--device {requested!r}: torch knows auto, cpu, gpu, cuda and mps")
    if requested == "gpu" and gpu is None:
        raise InputError("--device gpu: torch finds neither CUDA nor MPS; take --device cpu")
    if requested == "cuda" and gpu != "cuda":
        raise InputError("--device cuda: torch finds no CUDA device; take --device cpu")
    if requested == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch finds no MPS device; take --device cpu")
    return torch.device(gpu if requested == "gpu" and gpu else requested)
