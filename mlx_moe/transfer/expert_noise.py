"""Random differences between upcycled experts: noise, or neurons drawn anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.parameters import normal


@dataclass(frozen=True, eq=False)
class ExpertNoise:
    """Changes of each expert's tensor from the dense one.

    `noise` is the standard deviation of the added noise, relative to the tensor's. `dropped_EN` lists the neurons of
    each expert that are redrawn, normal with the mean and standard deviation of the numbers replaced (Drop-Upcycling,
    Nakamura et al. 2025); they lie along `neuron_axis`.
    """

    name: str
    seed: int
    noise: float
    dropped_EN: NDArray[np.int64]
    neuron_axis: int

    def expert(self, expert: int, source: NDArray[Any]) -> NDArray[Any]:
        """Return one expert's tensor, with the shape and dtype of its copy, the source."""
        made = source.astype(np.float64)
        if self.noise:
            made += self.noise * made.std() * normal(f"{self.name} {expert} noise", self.seed, source.shape)
        dropped_N = self.dropped_EN[expert]
        if len(dropped_N):
            place = (slice(None),) * self.neuron_axis + (dropped_N,)
            old = source[place].astype(np.float64)
            made[place] = old.mean() + old.std() * normal(f"{self.name} {expert} drop", self.seed, old.shape)
        return made.astype(source.dtype)
