"""Put known faults into PyTorch's side one at a time, and check that the comparison finds them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mlx_moe.errors import InputError
from mlx_moe.parameters import Arrays
from mlx_moe.training.backend import Trainer, choose_backend
from parity.compare import BackendPair
from parity.decoding import judge_decoding
from parity.judgement import judge
from parity.mutations import MUTATIONS, SIZED, Mutation, Patch, faultless
from parity.reference_forward import Measurement, ReferenceForward
from parity.report import ModelVerdict, MutationOutcome, MutationThreshold, SelfTest, TensorVerdict
from parity.small_models import reference_tokens
from parity.step_parity import judge_step, step_tokens


def run(seed: int) -> SelfTest:
    """Run every mutation; for those with a size, also find the smallest size that is still caught."""
    runner = MutationRunner(seed)
    outcomes = []
    for mutation in MUTATIONS:
        verdict = runner.judge(mutation)
        outcomes.append(
            MutationOutcome(mutation.name, mutation.architecture, verdict.first_place(), verdict.first_fault())
        )
    thresholds = [MutationThreshold(name, _smallest(runner, make)) for name, make in SIZED.items()]
    return SelfTest(tuple(outcomes), tuple(thresholds))


class MutationRunner:
    """Small models on which mutations are judged; reference and MLX are measured once for each."""

    def __init__(self, seed: int):
        self._seed = seed
        self._ready: dict[str, tuple[ReferenceForward, Measurement, Arrays, Trainer]] = {}

    def judge(self, mutation: Mutation) -> ModelVerdict:
        """Return the verdict with the mutation in PyTorch's side.

        Raises InputError where the backends differ without a fault, because then no fault can be told apart.
        """
        reference, mlx, weights, mlx_trainer = self._prepared(mutation.architecture)
        config = reference.config.model_copy(update=dict(mutation.fields))
        edited = dict(weights) | dict(mutation.weights(weights)) if mutation.weights else weights
        with _patched(mutation.patch):
            trainer = choose_backend("torch").trainer(config, edited, device="cpu")
            verdict = judge(reference, mlx, reference.measure(trainer))
            more: list[TensorVerdict] = []
            if mutation.shows_in == "decode":
                more, _ = judge_decoding(reference, mlx_trainer, trainer)
            elif mutation.shows_in == "train":
                more = judge_step(reference.config, weights, step_tokens(reference, self._seed))
            return replace(verdict, tensors=(*verdict.tensors, *more))

    def _prepared(self, architecture: str) -> tuple[ReferenceForward, Measurement, Arrays, Trainer]:
        if architecture not in self._ready:
            config, weights = faultless(architecture, self._seed)
            pair = BackendPair.build(config, weights)
            reference = ReferenceForward(config, weights, reference_tokens(config, self._seed))
            mlx = reference.measure(pair.mlx)
            verdict = judge(reference, mlx, reference.measure(pair.torch))
            if not verdict.passed:
                raise InputError(
                    f"{architecture} differs without any fault, so no fault can be told apart: {verdict.first_fault()}"
                )
            self._ready[architecture] = (reference, mlx, weights, pair.mlx)
        return self._ready[architecture]


def _smallest(runner: MutationRunner, make: Callable[[float], Mutation]) -> float | None:
    smallest = None
    for exponent in range(1, 9):
        if runner.judge(make(10.0**-exponent)).passed:
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
