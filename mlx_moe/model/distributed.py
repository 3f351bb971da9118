"""The processes that train together, as `mlx.launch` starts them: over a ring of sockets, MPI or Thunderbolt (JACCL).

Every process holds everything and takes as many rows of the global batch; gradients are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlx_moe.training.backend import Tokens


@dataclass(frozen=True)
class World:
    """This process among all; alone, every method leaves things as they are."""

    rank: int
    size: int

    def rows(self, tokens_BT1: Tokens) -> Tokens:
        """This process's share of a global batch."""
        share = len(tokens_BT1) // self.size
        return tokens_BT1[self.rank * share : (self.rank + 1) * share]

    def mean(self, array: mx.array) -> mx.array:
        """The mean over the processes, outside of differentiation."""
        return array if self.size == 1 else mx.distributed.all_sum(mx.stop_gradient(array)) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; asks the hosts and leaves the devices alone."""
        if self.size == 1:
            return flag
        return bool(mx.distributed.all_sum(mx.array(int(flag)), stream=mx.cpu).item())


@cache
def connect() -> World:
    """Meet the other processes, once. Alone without `mlx.launch`."""
    group = mx.distributed.init()
    return World(group.rank(), group.size())
