"""The processes that train together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ProcessGroup(Protocol):
    """The processes that train together, this one among them; process 0 alone reads and writes the run's folder."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the processes' values. The hosts communicate; the devices do not wait."""

    def broadcast(self, data: bytes) -> bytes:
        """Return process 0's data; that of the others is ignored."""


@dataclass(frozen=True)
class SingleProcess:
    """A group of one process."""

    rank: int = 0
    size: int = 1

    def all_reduce_max(self, value: int) -> int:
        return value

    def broadcast(self, data: bytes) -> bytes:
        return data
