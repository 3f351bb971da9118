"""The processes that train together: what a process asks of the others, and a process alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class World(Protocol):
    """The processes that train together, this one among them; process 0 alone reads and writes the run's folder."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def largest(self, value: int) -> int:
        """The largest of the processes' values; asks the hosts and leaves the devices alone."""

    def from_first(self, data: bytes) -> bytes:
        """What process 0 has; what the others have is not looked at."""


@dataclass(frozen=True)
class Alone:
    """A world of one."""

    rank: int = 0
    size: int = 1

    def largest(self, value: int) -> int:
        return value

    def from_first(self, data: bytes) -> bytes:
        return data
