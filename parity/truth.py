"""What a model should compute, tensor by tensor, and how far from it each backend is.

B batch, T time, N tokens (B·T), E experts, K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Weights
from mlx_moe.training.backend import Tokens, Trainer
from parity.oracle import Array, Call, Oracle, best_experts, through


@dataclass(frozen=True)
class Error:
    """Of a tensor against the truth; the largest is at `place`, where it is `found`, not `expected`."""

    rmse: float
    largest: float
    place: tuple[int, ...] = ()
    found: float = 0.0
    expected: float = 0.0

    @staticmethod
    def of(found: Array, expected: Array) -> Error:
        # A tensor of the wrong shape, or not finite, is infinitely wrong.
        if found.shape != expected.shape or not np.isfinite(found).all():
            return Error(np.inf, np.inf)
        distance = np.abs(found.astype(np.float64) - expected)
        place = tuple(int(i) for i in np.unravel_index(distance.argmax(), distance.shape))
        rmse, largest = float(np.sqrt(np.square(distance).mean())), float(distance[place])
        return Error(rmse, largest, place, float(found[place]), float(expected[place]))

    @staticmethod
    def worst(errors: Sequence[Error]) -> Error:
        """The largest RMSE and the largest error of several."""
        return Error(max(error.rmse for error in errors), max(error.largest for error in errors))

    def times(self, other: Error, least: Error) -> tuple[float, float]:
        """RMSE and largest error, as multiples of the other's; what is less than `least` counts as that."""
        return (
            _ratio(max(self.rmse, least.rmse), max(other.rmse, least.rmse)),
            _ratio(max(self.largest, least.largest), max(other.largest, least.largest)),
        )


@dataclass(frozen=True)
class Statistics:
    """Of the truth."""

    shape: tuple[int, ...]
    mean: float
    std: float
    smallest: float
    largest: float

    @staticmethod
    def of(array: Array) -> Statistics:
        return Statistics(
            array.shape, *(float(value) for value in (array.mean(), array.std(), array.min(), array.max()))
        )


@dataclass(frozen=True)
class Expected:
    """One tensor's truth, and what may be asked of float32."""

    truth: Array
    floor: Error
    float32: Error

    @staticmethod
    def of(truth: Array, in_float32: Array) -> Expected:
        floor, float32 = Error.of(truth.astype(np.float32), truth), Error.of(in_float32, truth)
        return Expected(truth, floor, float32)


@dataclass(frozen=True)
class Routes:
    """A backend's routing, layer by layer, with the truth's routes above each layer."""

    flipped_LN: NDArray[np.bool_]  # another set of experts than the truth's
    error_LN: Array  # by how much the backend's router logits move apart from the truth's, at most
    unexplained: int  # choices, in a run of its own, that are not the best by its own router logits


@dataclass(frozen=True)
class Measurement:
    """One backend against the truth. `own`: each module fed the truth's input; `propagated`: fed what came so far."""

    own: dict[str, Error]
    propagated: dict[str, Error]
    whole: dict[str, Error]  # of the model run as one: router logits, logits
    routes: Routes
    logits_BTV: Array


class Truth:
    """What a model should compute on these tokens (B, T), module by module."""

    def __init__(self, config: ModelConfig, weights: Weights, tokens_BT: Tokens):
        self.config, self.tokens_BT = config, tokens_BT
        exact, plain = Oracle(config, weights), Oracle(config, weights, np.float32)
        self.oracle = exact
        self.trace = exact(tokens_BT)
        self.experts_LNK = self.trace.experts_LNK
        self.logits_BTV = self.trace.logits_BTV
        self.margin_LN = margins(self.trace.router_logits_LNE, self.experts_LNK)
        in_float32 = plain(tokens_BT, self.experts_LNK)
        self.float32_BTV = in_float32.logits_BTV
        self.inputs = {name: self._rounded(name, call) for name, call in self.trace.calls.items()}
        self.own = {
            name: Expected.of(exact.module(name, *inputs), plain.module(name, *inputs))
            for name, inputs in self.inputs.items()
        }
        self.whole = {
            name: Expected.of(call.output, in_float32.calls[name].output)
            for name, call in self.trace.calls.items()
            if name.endswith(".router") or name == "lm_head"
        }
        if config.weight_tying:
            del self.inputs["lm_head"]  # no module of its own

    def measure(self, trainer: Trainer) -> Measurement:
        """Run a backend's modules one by one, and its model as a whole."""
        own = {
            name: Error.of(trainer.module_output(name, *inputs), self.own[name].truth)
            for name, inputs in self.inputs.items()
        }
        propagated: dict[str, Error] = {}

        def call(name: str, *inputs: Array) -> Array:
            output = trainer.module_output(name, *inputs)
            propagated[name] = Error.of(output, self.trace.calls[name].output)
            return output

        through(self.config, self.tokens_BT, call, self.experts_LNK)
        run, unexplained = trainer.routed_logits(self.tokens_BT), 0
        if self.config.moe:
            best_LNK = best_experts(run.router_logits_LNE, self.config.moe.top_k)
            unexplained = int(_differ(run.experts_LNK, best_LNK).sum())
            if _differ(run.experts_LNK, self.experts_LNK).any():
                run = trainer.routed_logits(self.tokens_BT, self.experts_LNK)
        routers = [name for name in self.whole if name.endswith(".router")]
        found = dict(zip(routers, run.router_logits_LNE, strict=True)) | {"lm_head": run.logits_BTV}
        return Measurement(
            own=own,
            propagated=propagated,
            whole={name: Error.of(found[name], expected.truth) for name, expected in self.whole.items()},
            routes=self._routes(run.router_logits_LNE, unexplained),
            logits_BTV=run.logits_BTV,
        )

    def _routes(self, router_logits_LNE: Array, unexplained: int) -> Routes:
        difference_LNE = router_logits_LNE - self.trace.router_logits_LNE
        if not self.config.moe:
            return Routes(np.zeros((0, 0), bool), np.zeros((0, 0)), unexplained)
        chosen_LNK = best_experts(router_logits_LNE, self.config.moe.top_k)
        return Routes(_differ(chosen_LNK, self.experts_LNK), np.ptp(difference_LNE, axis=-1), unexplained)

    def _rounded(self, name: str, call: Call) -> tuple[Array, ...]:
        """The truth's inputs as a backend can take them; a MoE with the truth's routes."""
        inputs = call.inputs
        if name.endswith(".mlp") and (layer := int(name.split(".")[1])) in self.config.expert_layers:
            inputs = (inputs[0], self.experts_LNK[self.config.expert_layers.index(layer)])
        return tuple(array if array.dtype.kind == "i" else array.astype(np.float32) for array in inputs)


def margins(router_logits: Array, experts: NDArray[np.int64]) -> Array:
    """By how much the last of the experts (..., K) beats the next one, (...); from router logits (..., E)."""
    top_k, n_experts = experts.shape[-1], router_logits.shape[-1]
    if not len(router_logits) or top_k == n_experts:
        return np.full(experts.shape[:-1] or (0, 0), np.inf)
    falling = -np.sort(-router_logits, axis=-1)
    found: Array = falling[..., top_k - 1] - falling[..., top_k]
    return found


def _differ(one_LNK: NDArray[np.int64], other_LNK: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a token goes to other experts, in whatever order, (L, N)."""
    if one_LNK.shape != other_LNK.shape:
        return np.ones(other_LNK.shape[:-1], bool)
    different: NDArray[np.bool_] = (np.sort(one_LNK, axis=-1) != np.sort(other_LNK, axis=-1)).any(axis=-1)
    return different


def _ratio(one: float, other: float) -> float:
    if one == other:
        return 1.0
    return one / other if other else np.inf
