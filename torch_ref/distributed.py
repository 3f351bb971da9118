"""The processes that train together, as `torchrun` starts them: who is who, and what each of them holds.

A gradient is the mean over the rows of the global batch, so every process takes as many of them.

===== ====================================================================================================
ddp   every process holds everything; gradients are averaged (DistributedDataParallel)
zero1 also shards the optimizer's state, whole tensors to each (ZeroRedundancyOptimizer; Rajbhandari et al. 2020)
fsdp  shards weights, gradients and state, each tensor in slices (FSDP2, `fully_shard`; Zhao et al. 2023)
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
class ProcessGroup:
    """This process among those that train together. In a group of one, every method returns its argument."""

    rank: int
    size: int

    def sum(self, array: Tensor) -> Tensor:
        """Return the sum over the processes; no gradient goes through it."""
        if self.size == 1:
            return array
        array = array.detach().clone()
        dist.all_reduce(array)
        return array

    def mean(self, array: Tensor) -> Tensor:
        """Return the mean over the processes; no gradient goes through it."""
        return array if self.size == 1 else self.sum(array) / self.size

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the processes' values. The hosts communicate; the devices do not wait."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def broadcast(self, data: bytes) -> bytes:
        """Return process 0's data; that of the others is ignored."""
        if self.size == 1:
            return data
        received = torch.zeros(self.all_reduce_max(len(data) if self.rank == 0 else 0), dtype=torch.uint8)
        if self.rank == 0:
            received = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(received, src=0)
        return received.numpy().tobytes()


@cache
def connect() -> ProcessGroup:
    """Join the processes that `torchrun` started, once; a group of one without it.

    Raises InputError if `torchrun`'s environment variables are incomplete or the processes do not find each other.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    size = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if size == 1:
        return ProcessGroup(0, 1)
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
    return ProcessGroup(dist.get_rank(), size)


def shard(model: Transformer, world: ProcessGroup, strategy: str) -> None:
    """Leave a slice of each weight to each process in `fsdp`, in place; nothing otherwise."""
    if world.size == 1 or strategy != "fsdp":
        return
    from torch.distributed.fsdp import fully_shard  # a second to load, which a run on one device need not wait for

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def average_gradients(model: Transformer, world: ProcessGroup, strategy: str) -> nn.Module:
    """Return a module to call in place of the model, whose gradients are means over the processes."""
    return model if world.size == 1 or strategy == "fsdp" else DistributedDataParallel(model)


def shard_optimizer(
    optimizer: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    world: ProcessGroup,
    strategy: str,
) -> torch.optim.Optimizer:
    """Return the optimizer over parameter groups; in `zero1`, this process's shard of it."""
    if world.size == 1 or strategy != "zero1":
        return optimizer(groups, **defaults)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer, **defaults)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that holds this process's state: in `zero1`, the one inside."""
    part: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this process may hold a slice."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    """Return a float32 array of all of a tensor; it shares no memory with it."""
    return full_tensor(tensor.detach()).float().cpu().numpy().copy()


def distribute_like(parameter: Tensor, array: NDArray[np.float32]) -> Tensor:
    """Return an array as a tensor on the device of a parameter, sliced as the parameter is."""
    tensor = torch.tensor(array, device=parameter.device)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, parameter.placements)  # type: ignore[attr-defined]
