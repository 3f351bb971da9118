"""The processes that train together, as `torchrun` starts them: who is who, and what each of them holds.

A gradient is the mean over the rows of the global batch, so every process takes as many of them.

===== ====================================================================================================
ddp   every process holds everything; gradients are averaged (DistributedDataParallel)
zero1 and shares out the optimizer's state, whole tensors to each (ZeroRedundancyOptimizer; Rajbhandari et al. 2020)
fsdp  shares out weights, gradients and state, each tensor in slices (FSDP2, `fully_shard`; Zhao et al. 2023)
===== ====================================================================================================
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlx_moe.errors import InputError, one_line, quoted
from torch_ref.transformer import Transformer

FROM_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE


@dataclass(frozen=True)
class World:
    """This process among all; alone, every method leaves things as they are."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, outside of differentiation."""
        if self.size == 1:
            return tensor
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, outside of differentiation."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def largest(self, value: int) -> int:
        """The largest of the processes' values; asks the hosts and leaves the devices alone."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def from_first(self, data: bytes) -> bytes:
        """What process 0 has; what the others have is not looked at."""
        if self.size == 1:
            return data
        received = torch.zeros(self.largest(len(data) if self.rank == 0 else 0), dtype=torch.uint8)
        if self.rank == 0:
            received = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(received, src=0)
        return received.numpy().tobytes()


@cache
def connect() -> World:
    """Meet the other processes, once. Alone without `torchrun`. Raises InputError where what it sets is not whole."""
    text = os.environ.get("WORLD_SIZE", "1")
    size = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if size == 1:
        return World(0, 1)
    if size == 0 or (missing := [name for name in FROM_LAUNCHER if name not in os.environ]):
        why = f"and {missing[0]} is not" if size else "which is no number of processes"
        raise InputError(f"WORLD_SIZE {quoted(text)} is set, {why}; start with torchrun, or unset WORLD_SIZE")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    except (ValueError, RuntimeError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"cannot meet the other processes at {quoted(where)}: {one_line(error)}") from None
    return World(dist.get_rank(), size)


def shard(model: Transformer, world: World, strategy: str) -> None:
    """Leave a slice of each weight to each process in `fsdp`, in place; nothing otherwise."""
    if world.size == 1 or strategy != "fsdp":
        return
    from torch.distributed.fsdp import fully_shard  # a second to load, which a run on one device need not wait for

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def average_gradients(model: Transformer, world: World, strategy: str) -> nn.Module:
    """Return a module to call in place of the model, whose gradients are means over the processes."""
    return model if world.size == 1 or strategy == "fsdp" else DistributedDataParallel(model)


def share_out(
    optimizer: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    world: World,
    strategy: str,
) -> torch.optim.Optimizer:
    """The optimizer over parameter groups; in `zero1`, this process's part of it."""
    if world.size == 1 or strategy != "zero1":
        return optimizer(groups, **defaults)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer, **defaults)


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this process's state: in `zero1`, the one inside."""
    part: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return part


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a slice."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole(tensor: Tensor) -> NDArray[np.float32]:
    """The same as an array of its own."""
    return gathered(tensor.detach()).float().cpu().numpy().copy()


def like(parameter: Tensor, array: NDArray[np.float32]) -> Tensor:
    """An array on the device of a parameter, in the slices of that parameter."""
    tensor = torch.tensor(array, device=parameter.device)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, parameter.placements)  # type: ignore[attr-defined]
