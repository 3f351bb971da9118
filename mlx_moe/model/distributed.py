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
class World:
    """This process among all; alone, every method leaves things as they are."""

    rank: int
    size: int

    def mean(self, array: mx.array) -> mx.array:
        """The mean over the processes, outside of differentiation."""
        return array if self.size == 1 else mx.distributed.all_sum(mx.stop_gradient(array)) / self.size

    def largest(self, value: int) -> int:
        """The largest of the processes' values; asks the hosts and leaves the devices alone."""
        if self.size == 1:
            return value
        return int(np.array(mx.distributed.all_max(mx.array(value), stream=mx.cpu)))

    def from_first(self, data: bytes) -> bytes:
        """What process 0 has; what the others have is not looked at."""
        if self.size == 1:
            return data
        n_bytes = self.largest(len(data) if self.rank == 0 else 0)
        own = np.frombuffer(data, np.uint8) if self.rank == 0 else np.zeros(n_bytes, np.uint8)
        return np.array(mx.distributed.all_sum(mx.array(own), stream=mx.cpu)).tobytes()


@cache
def connect() -> World:
    """Meet the other processes, once. Alone without `mlx.launch`. Raises InputError where they are not to be found."""
    group = mx.distributed.init()
    if group.size() == 1 and os.environ.get("MLX_RANK", "0") != "0":
        raise InputError("mlx.launch started several processes that do not find each other; try its --backend ring")
    return World(group.rank(), group.size())
