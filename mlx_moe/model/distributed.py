"""The processes that train together, as `mlx.launch` starts them: over a ring of sockets, MPI or Thunderbolt (JACCL).

Every process holds everything and takes as many rows of the global batch; gradients are averaged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_moe.errors import InputError


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together. In a group of one, every method returns its argument."""

    rank: int
    size: int

    def mean(self, array: mx.array) -> mx.array:
        """Return the mean over the processes; no gradient goes through it."""
        return array if self.size == 1 else mx.distributed.all_sum(mx.stop_gradient(array)) / self.size

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the processes' values. The hosts communicate; the devices do not wait."""
        if self.size == 1:
            return value
        return int(np.array(mx.distributed.all_max(mx.array(value), stream=mx.cpu)))

    def broadcast(self, data: bytes) -> bytes:
        """Return process 0's data; that of the others is ignored."""
        if self.size == 1:
            return data
        n_bytes = self.all_reduce_max(len(data) if self.rank == 0 else 0)
        own = np.frombuffer(data, np.uint8) if self.rank == 0 else np.zeros(n_bytes, np.uint8)
        return np.array(mx.distributed.all_sum(mx.array(own), stream=mx.cpu)).tobytes()


@cache
def connect() -> ProcessGroup:
    """Join the processes that `mlx.launch` started, once; a group of one without it.

    Raises InputError if they do not find each other.
    """
    group = mx.distributed.init()
    if group.size() == 1 and os.environ.get("MLX_RANK", "0") != "0":
        raise InputError("mlx.launch started several processes that do not find each other; try its --backend ring")
    return ProcessGroup(group.rank(), group.size())
