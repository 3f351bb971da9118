"""Processes that train together: the collectives they need, and the single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class World(Protocol):
    """Group of processes that train together; process 0 alone reads and writes the run's folder."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def largest(self, value: int) -> int:
        """Return the maximum over the processes; communicates between hosts, not devices."""

    def from_first(self, data: bytes) -> bytes:
        """Return process 0's data; the arguments of the others are ignored."""


@dataclass(frozen=True)
class Alone:
    """A group of one process."""

    rank: int = 0
    size: int = 1

    def largest(self, value: int) -> int:
        return value

    def from_first(self, data: bytes) -> bytes:
        return data
