"""AdamW, and Muon for the hidden matrices, with their state as named arrays, on PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from mlx_moe.config import ModelConfig, OptimizerConfig
from mlx_moe.parameters import Arrays, check_optimizer_state, optimizer_groups
from torch_ref import place_compiler_cache
from torch_ref.distributed import World, like, own_part, share_out

# What PyTorch's optimizers call m and v.
STATE_KEYS = {"muon": {"m": "momentum_buffer"}, "adamw": {"m": "exp_avg", "v": "exp_avg_sq"}}

# The quintic of Jordan et al. 2024: steep at 0 rather than exact at 1. After 5 steps, singular values that were 0.15 %
# or more of the matrix's Frobenius norm lie between 0.68 and 1.21.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7  # a gradient of 0, such as that of an expert that no token chose, gives a direction of 0


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices (out, in) and on stacks of them (E, out, in), each for itself.

    Nesterov momentum, decoupled decay. Orthogonal matrices are scaled by 0.2·√max(out, in) to AdamW's usual root mean
    square, so that one learning rate and one decay serve both (Moonlight, Liu et al. 2025).
    `dtype` is that of the Newton–Schulz iteration.
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
                parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(parameter.shape[-2:]) ** 0.5)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U·Vᵀ of every matrix U·S·Vᵀ in (..., out, in), with singular values near 1; by products only, in `dtype`."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    x = x.reshape(-1, *x.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def build_optimizers(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: ModelConfig,
    optimizer: OptimizerConfig,
    world: World,
    strategy: str,
) -> list[torch.optim.Optimizer]:
    """[AdamW] or [Muon, AdamW]. Their learning rate is 0 until each step sets it."""
    place_compiler_cache()  # the first optimizer of a process loads the compiler
    parameters = dict(named_parameters)
    groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for group in optimizer_groups(config, optimizer):
        params = [parameters[name] for name in group.names]
        groups[group.rule].append({"params": params, "weight_decay": group.weight_decay})
    adamw = {"lr": 0.0, "betas": optimizer.betas, "eps": optimizer.eps, "fused": True}
    optimizers = [share_out(torch.optim.AdamW, groups["adamw"], adamw, world, strategy)]
    if groups["muon"]:
        optimizers.insert(0, share_out(Muon, groups["muon"], {"momentum": optimizer.momentum}, world, strategy))
    return optimizers


def state_tensors(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: ModelConfig,
    optimizer: OptimizerConfig,
    world: World,
) -> dict[str, Tensor]:
    """Those of `parameters.optimizer_table`, as they are; zeros before the first step."""
    states = {parameter: state for one in optimizers for parameter, state in own_part(one).state.items()}
    is_shared_out = any(own_part(one) is not one for one in optimizers)
    tensors = {"step": torch.zeros(())}
    for rule, name, parameter in _ruled(named_parameters, config, optimizer):
        state = states.get(parameter, {})  # PyTorch makes it in the first step
        for moment, key in STATE_KEYS[rule].items():
            tensor = state[key] if state else torch.zeros_like(parameter)
            tensors[f"{moment}.{name}"] = world.sum(tensor) if is_shared_out else tensor
        if "step" in state:
            tensors["step"] = state["step"]
    return tensors


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: ModelConfig,
    optimizer: OptimizerConfig,
    arrays: Arrays,
) -> None:
    """Go on from a state that either backend wrote. Raises InputError where it is not of this model and optimizer."""
    check_optimizer_state(config, optimizer, arrays)
    parts = [own_part(one) for one in optimizers]
    owner = {parameter: one for one in parts for group in one.param_groups for parameter in group["params"]}
    for rule, name, parameter in _ruled(named_parameters, config, optimizer):
        if parameter not in owner:
            continue
        state = {key: like(parameter, arrays[f"{moment}.{name}"]) for moment, key in STATE_KEYS[rule].items()}
        if rule == "adamw":
            state["step"] = torch.tensor(float(arrays["step"]), device=parameter.device)
        owner[parameter].state[parameter] = state


def _ruled(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, optimizer: OptimizerConfig
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(rule, name, parameter), in the order of the groups."""
    parameters = dict(named_parameters)
    for group in optimizer_groups(config, optimizer):
        yield from ((group.rule, name, parameters[name]) for name in group.names)
