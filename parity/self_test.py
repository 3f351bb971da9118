"""Known faults, put into one backend one at a time: does the comparison find them?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays
from mlx_moe.training.backend import Trainer, choose_backend
from parity.compare import Pair
from parity.decoding import judge_decoding
from parity.mutations import MUTATIONS, SIZED, Mutation, Patch, faultless
from parity.small_models import truth_tokens
from parity.steps import judge_step, step_tokens
from parity.truth import Measurement, Truth
from parity.yardstick import Judged, Verdict, judge


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    where: str | None  # the first module that is wrong; None if nothing was noticed
    said: str | None

    @property
    def caught(self) -> bool:
        return self.where is not None


@dataclass(frozen=True)
class Threshold:
    """The smallest fault of a kind that is still caught, in steps of ten."""

    name: str
    smallest: float | None


class Laboratory:
    """The models of the comparison, with the truth and MLX measured once."""

    def __init__(self, seed: int):
        self._seed = seed
        self._ready: dict[str, tuple[Truth, Measurement, Arrays, Trainer]] = {}

    def judge(self, mutation: Mutation) -> Verdict:
        """Raises InputError where the backends differ without a fault: then nothing can be told from one."""
        truth, mlx, weights, mlx_trainer = self._prepared(mutation.architecture)
        config = truth.config.model_copy(update=dict(mutation.fields))
        edited = dict(weights) | dict(mutation.weights(weights)) if mutation.weights else weights
        with _patched(mutation.patch):
            trainer = choose_backend("torch").trainer(config, edited, device="cpu")
            verdict = judge(truth, mlx, truth.measure(trainer))
            more: list[Judged] = []
            if mutation.shows_in == "cache":
                more, _ = judge_decoding(truth, mlx_trainer, trainer)
            elif mutation.shows_in == "step":
                more = judge_step(truth.config, weights, step_tokens(truth, self._seed))
            return replace(verdict, tensors=(*verdict.tensors, *more))

    def _prepared(self, architecture: str) -> tuple[Truth, Measurement, Arrays, Trainer]:
        if architecture not in self._ready:
            config, weights = faultless(architecture, self._seed)
            pair, truth = Pair.build(config, weights), Truth(config, weights, truth_tokens(config, self._seed))
            mlx = truth.measure(pair.mlx)
            verdict = judge(truth, mlx, truth.measure(pair.torch))
            if not verdict.passed:
                raise InputError(
                    f"{architecture} differs without any fault, so none can be told: {verdict.first_fault()}"
                )
            self._ready[architecture] = (truth, mlx, weights, pair.mlx)
        return self._ready[architecture]


def run(seed: int) -> tuple[list[Outcome], list[Threshold]]:
    """Every mutation, and for those that have a size the smallest that is caught."""
    laboratory = Laboratory(seed)
    outcomes = []
    for mutation in MUTATIONS:
        verdict = laboratory.judge(mutation)
        outcomes.append(Outcome(mutation, verdict.first_place(), verdict.first_fault()))
    return outcomes, [Threshold(name, _smallest(laboratory, make)) for name, make in SIZED.items()]


def _smallest(laboratory: Laboratory, make: Callable[[float], Mutation]) -> float | None:
    smallest = None
    for exponent in range(1, 9):
        if laboratory.judge(make(10.0**-exponent)).passed:
            break
        smallest = 10.0**-exponent
    return smallest


@contextmanager
def _patched(patch: Patch | None) -> Iterator[None]:
    if patch is None:
        yield
        return
    module, name, make = patch
    name, _, key = name.rstrip("]").partition("[")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    table = getattr(owner, name) if key else vars(owner)
    old = table[key or name]
    put = table.__setitem__ if key else lambda name, value: setattr(owner, name, value)
    put(key or name, make(old))
    try:
        yield
    finally:
        put(key or name, old)
