"""Judge one training step against the float64 reference: every gradient, and every weight after AdamW.

B batch, T time, N tokens (B·T), K experts per token, L layers with experts.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.device import BackendName
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.precision import PrecisionName
from mlx_moe.training.backend import Tokens, choose_backend
from mlx_moe.transfer.permutation import plan_permutation
from mlx_moe.transfer.plan import Plan, apply_numpy
from parity.decoding import settled_positions
from parity.gradients import Gradients, adamw_step, loss_and_gradients
from parity.judgement import judge_tensor
from parity.numpy_model import Array, NumpyModel
from parity.reference_forward import Expected, ReferenceForward
from parity.report import TensorError, TensorVerdict

TOKENS = 64
TRIES = 8
# Plain float32 is measured with its sums in this many orders, and the worst counts. Errors accumulate in the backward
# pass, and all numbers of a small gradient share the same few roundings. So one order says little: of two equally
# correct programs, one may be twice as far off as the other.
ORDERS = 3
# In a layer that growth added, the router and the norm before it get gradients from the auxiliary terms alone. These
# arrive through one number per expert, and so do their errors. An RMS of eight numbers can double by chance.
SILENT_SLACK = 2.0
OVERFLOWS = 16  # each halves float16's loss scale, down to 1
STEPS_BEFORE = 10  # so that AdamW's bias corrections matter
LEARNING_RATE = 1e-2
NEGLIGIBLE = 1e-10  # of the largest gradient
GRADIENT, WEIGHT = "gradient of {}", "{} after a step"
# Gradients are read from the first moments, which start at 0. Second moments start at values that give steps of all
# sizes.
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)

Step = dict[tuple[str, str], Array]  # by GRADIENT or WEIGHT, and a parameter's name


def judge_step(
    config: ModelConfig, weights: Weights, tokens_BT1: Tokens, slack: float = 1.0, in_half: bool = True
) -> list[TensorVerdict]:
    """Judge every gradient and every weight after a step in float32, and every gradient in bfloat16 and float16.

    Half precision takes the reference's routes, and is left out unless `in_half`. `slack` widens all limits.
    """
    reference = StepReference(config, weights, tokens_BT1)
    mlx, torch = (reference.measure(backend, "fp32") for backend in ("mlx", "torch"))
    silent = _silent(config, weights)
    judged = [
        judge_tensor(
            name, "train", mlx[name], torch[name], expected, max(slack, SILENT_SLACK if name in silent else 1.0)
        )
        for name, expected in reference.expected.items()
    ]
    halves: tuple[PrecisionName, ...] = ("bf16", "fp16") if in_half else ()
    for precision in halves:
        mlx, torch = (reference.measure(backend, precision) for backend in ("mlx", "torch"))
        judged += [
            judge_tensor(f"{name} in {precision}", "half", mlx[name], torch[name], expected, slack)
            for name, expected in reference.expected.items()
            if name.startswith("gradient")
        ]
    return judged


def step_tokens(reference: ReferenceForward, seed: int) -> Tokens:
    """Return random tokens (2, T + 1) in which no experts tie up to rounding; the last try where all have ties."""
    config, rng = reference.config, np.random.default_rng(seed)
    shape = (2, min(TOKENS, config.context_length) + 1)
    for _ in range(TRIES):
        tokens_BT1 = rng.integers(0, config.vocab_size, shape).astype(np.int32)
        tokens_BT = tokens_BT1[:, :-1]
        if settled_positions(reference, reference.numpy_model(tokens_BT), tokens_BT.shape).all():
            break
    return tokens_BT1


def _silent(config: ModelConfig, weights: Weights) -> set[str]:
    """Return the gradients of routers, and of the norms before them, in layers whose experts output zeros."""
    layers = [
        f"layers.{layer}."
        for layer in config.expert_layers
        if not np.any(weights[f"layers.{layer}.mlp.experts.down_proj.weight"])
    ]
    norms = [f"post_attention_layernorm.{name}" for name in ("weight", "bias")]
    return {GRADIENT.format(layer + name) for layer in layers for name in (*norms, "mlp.router.weight")}


class StepReference:
    """Exact result of one training step on tokens (B, T + 1).

    `expected` holds tensors by name: "gradient of …" (AdamW's first moment) and "… after a step". Parameters without a
    gradient are left out, because only rounding is left of it: softmax ignores a bias of keys that are not rotated.
    """

    def __init__(self, config: ModelConfig, weights: Weights, tokens_BT1: Tokens):
        self._config, self._weights, self._tokens_BT1 = config, weights, tokens_BT1
        model = NumpyModel(config, weights)
        self._experts_LNK = model(tokens_BT1[:, :-1]).experts_LNK
        _, gradients = loss_and_gradients(model, tokens_BT1)
        rng = np.random.default_rng(0)
        self._squares = {
            name: (np.square(gradient).mean() * rng.uniform(0.2, 2, gradient.shape)).astype(np.float32)
            for name, gradient in gradients.items()
        }
        exact = _adamw(model, gradients, self._squares)
        in_float32 = [self._float32(plan_permutation(config, order), exact) for order in range(ORDERS)]
        sizes = {key: float(np.abs(array).max()) for key, array in exact.items() if key[0] == GRADIENT}
        kept = {name for (_, name), size in sizes.items() if size > NEGLIGIBLE * max(sizes.values())}
        self.expected = {
            kind.format(name): Expected(
                array, TensorError.between(array.astype(np.float32), array), TensorError.worst(errors)
            )
            for (kind, name), array in exact.items()
            if name in kept
            for errors in [[found[kind, name] for found in in_float32]]
        }

    def measure(self, backend: BackendName, precision: PrecisionName) -> dict[str, TensorError]:
        """Return a backend's errors under the names of `expected`. Half precision takes the reference's routes."""
        engine = EngineConfig(precision=precision)
        trainer = choose_backend(backend).trainer(self._config, self._weights, OPTIMIZER, "cpu", engine)
        state: Arrays = {"step": np.array(STEPS_BEFORE, np.float32)}
        for name, square in self._squares.items():
            state |= {f"m.{name}": np.zeros_like(square), f"v.{name}": square}
        trainer.load_optimizer_state(state)
        with _forced_routes(backend, self._experts_LNK) if precision != "fp32" else nullcontext():
            for _ in range(OVERFLOWS + 1):
                if math.isfinite(trainer.step(self._tokens_BT1, LEARNING_RATE, 0)().grad_norm):
                    break
        moments, weights = trainer.optimizer_state(), trainer.weights()
        found = {GRADIENT.format(name): moments[f"m.{name}"] for name in weights}
        found |= {WEIGHT.format(name): array for name, array in weights.items()}
        return {name: TensorError.between(found[name], expected.exact) for name, expected in self.expected.items()}

    def _float32(self, order: Plan, exact: Step) -> dict[tuple[str, str], TensorError]:
        """Return the errors of a plain float32 step, with the units of the model in another order."""
        permuted = NumpyModel(self._config, apply_numpy(order, self._weights), np.float32)
        _, gradients = loss_and_gradients(permuted, self._tokens_BT1, self._experts_LNK)
        found = _adamw(permuted, gradients, apply_numpy(order, self._squares))
        expected = {kind: apply_numpy(order, _of_kind(exact, kind)) for kind in (GRADIENT, WEIGHT)}
        return {(kind, name): TensorError.between(array, expected[kind][name]) for (kind, name), array in found.items()}


def _adamw(model: NumpyModel, gradients: Gradients, squares: Gradients) -> Step:
    weights, means = adamw_step(model, gradients, squares, OPTIMIZER, STEPS_BEFORE + 1, LEARNING_RATE)
    return {(GRADIENT, name): mean for name, mean in means.items()} | {
        (WEIGHT, name): weight for name, weight in weights.items()
    }


def _of_kind(step: Step, kind: str) -> Gradients:
    return {name: array for (key, name), array in step.items() if key == kind}


@contextmanager
def _forced_routes(backend: BackendName, experts_LNK: NDArray[np.int64]) -> Iterator[None]:
    """Make every forward pass of a backend take these experts, layer by layer, instead of its routers' choices."""
    moe: Any = importlib.import_module({"mlx": "mlx_moe.model.moe", "torch": "torch_ref.moe"}[backend])
    array = moe.mx.array if backend == "mlx" else moe.torch.from_numpy
    layers, original = cycle([array(experts_NK) for experts_NK in experts_LNK]), moe.choose_experts
    moe.choose_experts = lambda router_logits_NE, k: next(layers)
    try:
        yield
    finally:
        moe.choose_experts = original
