"""Run the float64 reference forward pass, and measure each backend against it, tensor by tensor.

B batch, T time, N tokens (B·T), E experts, K experts per token, L layers with experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Weights, layer_of
from mlx_moe.training.backend import Tokens, Trainer
from parity.numpy_model import Array, ModuleCall, NumpyModel, best_experts, run_modules
from parity.report import TensorError


@dataclass(frozen=True)
class Expected:
    """Exact values of a tensor, with the errors of rounding it and of plain float32."""

    exact: Array  # float64
    floor: TensorError  # of `exact`, rounded to float32
    float32: TensorError  # of the NumPy model in float32

    @staticmethod
    def of(exact: Array, in_float32: Array) -> Expected:
        """Return the expected tensor from the NumPy model's output in float64 and in float32, of one shape."""
        floor = TensorError.between(exact.astype(np.float32), exact)
        return Expected(exact, floor, TensorError.between(in_float32, exact))


@dataclass(frozen=True)
class RouteComparison:
    """A backend's routing beside the reference's, layer by layer. Each layer's input has the reference's routes."""

    flipped_LN: NDArray[np.bool_]  # whether a token goes to another set of experts
    error_LN: Array  # largest relative shift of the token's router logits
    unexplained: int  # choices in a free run that are not the best by the backend's own router logits


@dataclass(frozen=True)
class Measurement:
    """Errors of one backend against the reference, by tensor name."""

    modules: dict[str, TensorError]  # each module fed the reference's input
    propagated: dict[str, TensorError]  # each module fed the backend's own outputs
    model: dict[str, TensorError]  # router logits and logits of the whole model
    routes: RouteComparison
    logits_BTV: Array


class ReferenceForward:
    """Exact output of a model on tokens (B, T), and of every module in it."""

    def __init__(self, config: ModelConfig, weights: Weights, tokens_BT: Tokens):
        self.config, self.tokens_BT = config, tokens_BT
        exact, plain = NumpyModel(config, weights), NumpyModel(config, weights, np.float32)
        self.numpy_model = exact
        self.trace = exact(tokens_BT)
        self.experts_LNK = self.trace.experts_LNK
        self.logits_BTV = self.trace.logits_BTV
        self.margin_LN = margins(self.trace.router_logits_LNE, self.experts_LNK)
        in_float32 = plain(tokens_BT, self.experts_LNK)
        self.float32_BTV = in_float32.logits_BTV
        self.inputs = {name: self._rounded(name, call) for name, call in self.trace.calls.items()}
        self.modules = {
            name: Expected.of(exact.module(name, *inputs), plain.module(name, *inputs))
            for name, inputs in self.inputs.items()
        }
        self.model = {
            name: Expected.of(call.output, in_float32.calls[name].output)
            for name, call in self.trace.calls.items()
            if name.endswith(".router") or name == "lm_head"
        }
        if config.weight_tying:
            del self.inputs["lm_head"]  # not a module of its own

    def measure(self, trainer: Trainer) -> Measurement:
        """Run a backend's modules one by one and its model as a whole, and return the errors."""
        modules = {
            name: TensorError.between(trainer.module_output(name, *inputs), self.modules[name].exact)
            for name, inputs in self.inputs.items()
        }
        propagated: dict[str, TensorError] = {}

        def call(name: str, *inputs: Array) -> Array:
            output = trainer.module_output(name, *inputs)
            propagated[name] = TensorError.between(output, self.trace.calls[name].output)
            return output

        run_modules(self.config, self.tokens_BT, call, self.experts_LNK)
        run, unexplained = trainer.routed_logits(self.tokens_BT), 0
        if self.config.moe:
            best_LNK = best_experts(run.router_logits_LNE, self.config.moe.top_k)
            unexplained = int(_differ(run.experts_LNK, best_LNK).sum())
            if _differ(run.experts_LNK, self.experts_LNK).any():
                run = trainer.routed_logits(self.tokens_BT, self.experts_LNK)
        routers = [name for name in self.model if name.endswith(".router")]
        found = dict(zip(routers, run.router_logits_LNE, strict=True)) | {"lm_head": run.logits_BTV}
        return Measurement(
            modules=modules,
            propagated=propagated,
            model={name: TensorError.between(found[name], expected.exact) for name, expected in self.model.items()},
            routes=self._routes(run.router_logits_LNE, unexplained),
            logits_BTV=run.logits_BTV,
        )

    def _routes(self, router_logits_LNE: Array, unexplained: int) -> RouteComparison:
        difference_LNE = router_logits_LNE - self.trace.router_logits_LNE
        if not self.config.moe:
            return RouteComparison(np.zeros((0, 0), bool), np.zeros((0, 0)), unexplained)
        chosen_LNK = best_experts(router_logits_LNE, self.config.moe.top_k)
        return RouteComparison(_differ(chosen_LNK, self.experts_LNK), np.ptp(difference_LNE, axis=-1), unexplained)

    def _rounded(self, name: str, call: ModuleCall) -> tuple[Array, ...]:
        """Return the reference's inputs in float32, as a backend takes them; a MoE gets the reference's routes, too."""
        inputs = call.inputs
        if name.endswith(".mlp") and (layer := layer_of(name)) in self.config.expert_layers:
            inputs = (inputs[0], self.experts_LNK[self.config.expert_layers.index(layer)])
        return tuple(array if array.dtype.kind == "i" else array.astype(np.float32) for array in inputs)


def margins(router_logits: Array, experts: NDArray[np.int64]) -> Array:
    """Return the K-th largest router logit minus the next, (...); inf where there is no next.

    router_logits (..., E), experts (..., K).
    """
    top_k, n_experts = experts.shape[-1], router_logits.shape[-1]
    if not len(router_logits) or top_k == n_experts:
        return np.full(experts.shape[:-1] or (0, 0), np.inf)
    falling = -np.sort(-router_logits, axis=-1)
    found: Array = falling[..., top_k - 1] - falling[..., top_k]
    return found


def _differ(left_LNK: NDArray[np.int64], right_LNK: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each token goes to another set of experts, (L, N)."""
    if left_LNK.shape != right_LNK.shape:
        return np.ones(right_LNK.shape[:-1], bool)
    different: NDArray[np.bool_] = (np.sort(left_LNK, axis=-1) != np.sort(right_LNK, axis=-1)).any(axis=-1)
    return different
