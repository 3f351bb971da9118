"""AdamW, and Muon for the hidden matrices, with their state as named arrays, on PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlx_moe.parameters import Arrays, check_optimizer_state, optimizer_groups
from mlx_moe.training.muon import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, SMALLEST_NORM, update_rms
from mlx_moe.training.step_settings import StepSettings
from torch_ref import place_compiler_cache
from torch_ref.distributed import ProcessGroup, distribute_like, local_optimizer, shard_optimizer

Array = Tensor

# Names of m and v in the state of PyTorch's optimizers.
STATE_KEYS = {"muon": {"m": "momentum_buffer"}, "adamw": {"m": "exp_avg", "v": "exp_avg_sq"}}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices (out, in) and on stacks of them (E, out, in), each for itself.

    Nesterov momentum, decoupled decay, steps as large as `update_rms` says. `dtype` is that of the iteration.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                direction = orthogonalize(gradient.lerp(mean, group["momentum"]), group["dtype"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * update_rms(parameter.shape))


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return U·Vᵀ of every matrix U·S·Vᵀ in (..., out, in), with singular values near 1; by products in `dtype`."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    x = x.reshape(-1, *x.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


class RuledParameter(NamedTuple):
    """A trained parameter and the rule that updates it."""

    rule: str
    name: str
    parameter: Array


class MultiOptimizer:
    """An optimizer for each rule, as one: [AdamW] or [Muon, AdamW]."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[RuledParameter], world: ProcessGroup
    ):
        self.optimizers, self.parameters, self.world = optimizers, parameters, world

    @property
    def learning_rate(self) -> float:
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def step(self) -> None:
        """Update all parameters by the gradients that they hold."""
        for optimizer in self.optimizers:
            optimizer.step()


def build_optimizer(parameters: Mapping[str, Array], settings: StepSettings, world: ProcessGroup) -> MultiOptimizer:
    """Return AdamW, or Muon and AdamW, for the trained parameters. The learning rate is 0 until each step sets it."""
    place_compiler_cache()  # the first optimizer of a process loads the compiler
    optimizer, strategy = settings.optimizer, settings.engine.strategy
    groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    ruled = list[RuledParameter]()
    for group in optimizer_groups(settings.model, optimizer):
        params = [parameters[name] for name in group.names]
        groups[group.rule].append({"params": params, "weight_decay": group.weight_decay})
        ruled += [RuledParameter(group.rule, name, parameters[name]) for name in group.names]
    adamw = {"lr": 0.0, "betas": optimizer.betas, "eps": optimizer.eps, "fused": True}
    optimizers = [shard_optimizer(torch.optim.AdamW, groups["adamw"], adamw, world, strategy)]
    if groups["muon"]:
        optimizers.insert(0, shard_optimizer(Muon, groups["muon"], {"momentum": optimizer.momentum}, world, strategy))
    return MultiOptimizer(optimizers, ruled, world)


def state_tensors(multi: MultiOptimizer) -> dict[str, Array]:
    """Return the tensors of `parameters.optimizer_table`, not copied; zeros before the first step."""
    states = {parameter: state for one in multi.optimizers for parameter, state in local_optimizer(one).state.items()}
    is_sharded = any(local_optimizer(one) is not one for one in multi.optimizers)
    tensors = {"step": torch.zeros(())}
    for rule, name, parameter in multi.parameters:
        state = states.get(parameter, {})  # PyTorch makes it in the first step
        for moment, key in STATE_KEYS[rule].items():
            tensor = state[key] if state else torch.zeros_like(parameter)
            tensors[f"{moment}.{name}"] = multi.world.sum(tensor) if is_sharded else tensor
        if "step" in state:
            tensors["step"] = state["step"]
    return tensors


def load_optimizer_state(multi: MultiOptimizer, settings: StepSettings, arrays: Arrays) -> None:
    """Continue from a state that either backend wrote. Raises InputError if it is not of this model and optimizer."""
    check_optimizer_state(settings.model, settings.optimizer, arrays)
    parts = [local_optimizer(one) for one in multi.optimizers]
    owner = {parameter: one for one in parts for group in one.param_groups for parameter in group["params"]}
    for rule, name, parameter in multi.parameters:
        if parameter not in owner:
            continue
        state = {
            key: distribute_like(parameter, arrays[f"{moment}.{name}"]) for moment, key in STATE_KEYS[rule].items()
        }
        if rule == "adamw":
            state["step"] = torch.tensor(float(arrays["step"]), device=parameter.device)
        owner[parameter].state[parameter] = state
