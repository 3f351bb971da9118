"""One training step against the truth: every gradient, and every weight after AdamW.

B batch, T time, N tokens (B·T), E experts, K experts per token, L layers.
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
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.precision import PrecisionName
from mlx_moe.training.backend import BackendName, Tokens, choose_backend
from mlx_moe.transfer.plan import Plan, apply
from mlx_moe.transfer.reordering import plan_reordering
from parity.decoding import settled
from parity.gradients import Gradients, adamw_step, loss_and_gradients
from parity.oracle import Array, Oracle
from parity.truth import Error, Expected, Truth
from parity.yardstick import Judged, judge_tensor

TOKENS = 64
TRIES = 8
# Orders of its sums in which plain float32 is measured, and the worst of them counts. Errors pile up on the way back,
# and all numbers of a small tensor inherit the same few of them, so that one order tells little: of equal programs, one
# may be twice as far off as the other.
ORDERS = 3
# In a layer that growth added, what leads to the router has gradients from the auxiliary terms alone. They come through
# one number for each expert, and so do their errors: of eight or fewer, one root mean square is easily twice another.
SILENT_SLACK = 2.0
OVERFLOWS = 16  # each halves the scale of float16's loss, down to 1
STEPS_BEFORE = 10  # so that AdamW's corrections count
LEARNING_RATE = 1e-2
NOTHING = 1e-10  # of the largest gradient
GRADIENT, WEIGHT = "gradient of {}", "{} after a step"
# Gradients are read off the first moments, which start at 0; the second start where they make steps of all sizes.
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)

Step = dict[tuple[str, str], Array]  # by GRADIENT or WEIGHT, and a parameter's name


def judge_step(
    config: ModelConfig, weights: Weights, tokens_BT1: Tokens, slack: float = 1.0, in_half: bool = True
) -> list[Judged]:
    """Every gradient and every weight after a step; and `in_half` precision the gradients, with the truth's routes.

    `slack` widens all limits.
    """
    truth = StepTruth(config, weights, tokens_BT1)
    mlx, torch = (truth.measure(backend, "fp32") for backend in ("mlx", "torch"))
    silent = _silent(config, weights)
    judged = [
        judge_tensor(
            name, "step", mlx[name], torch[name], expected, max(slack, SILENT_SLACK if name in silent else 1.0)
        )
        for name, expected in truth.expected.items()
    ]
    halves: tuple[PrecisionName, ...] = ("bf16", "fp16") if in_half else ()
    for precision in halves:
        mlx, torch = (truth.measure(backend, precision) for backend in ("mlx", "torch"))
        judged += [
            judge_tensor(f"{name} in {precision}", "half", mlx[name], torch[name], expected, slack)
            for name, expected in truth.expected.items()
            if name.startswith("gradient")
        ]
    return judged


def step_tokens(truth: Truth, seed: int) -> Tokens:
    """(2, T + 1) at random, of the first batches one in which no experts tie up to rounding; else the last."""
    config, rng = truth.config, np.random.default_rng(seed)
    shape = (2, min(TOKENS, config.context_length) + 1)
    for _ in range(TRIES):
        tokens_BT1 = rng.integers(0, config.vocab_size, shape).astype(np.int32)
        if settled(truth, truth.oracle(tokens_BT1[:, :-1]), tokens_BT1[:, :-1].shape).all():
            break
    return tokens_BT1


def _silent(config: ModelConfig, weights: Weights) -> set[str]:
    """The gradients of the router, and of the norm before it, in layers whose experts write nothing yet."""
    layers = [
        f"layers.{layer}."
        for layer in config.expert_layers
        if not np.any(weights[f"layers.{layer}.mlp.experts.down_proj.weight"])
    ]
    norms = [f"post_attention_layernorm.{name}" for name in ("weight", "bias")]
    return {GRADIENT.format(layer + name) for layer in layers for name in (*norms, "mlp.router.weight")}


class StepTruth:
    """What one step should make of a model, from tokens (B, T + 1).

    `expected`: by "gradient of …", which is AdamW's first moment, and "… after a step". Without what has no gradient
    and therefore only rounding: a bias of keys that are not rotated, which softmax does not notice.
    """

    def __init__(self, config: ModelConfig, weights: Weights, tokens_BT1: Tokens):
        self._config, self._weights, self._tokens_BT1 = config, weights, tokens_BT1
        exact = Oracle(config, weights)
        self._experts_LNK = exact(tokens_BT1[:, :-1]).experts_LNK
        _, gradients = loss_and_gradients(exact, tokens_BT1)
        rng = np.random.default_rng(0)
        self._squares = {
            name: (np.square(gradient).mean() * rng.uniform(0.2, 2, gradient.shape)).astype(np.float32)
            for name, gradient in gradients.items()
        }
        truth = _adamw(exact, gradients, self._squares)
        in_float32 = [self._float32(plan_reordering(config, order), truth) for order in range(ORDERS)]
        means = {key: float(np.abs(array).max()) for key, array in truth.items() if key[0] == GRADIENT}
        kept = {name for (_, name), mean in means.items() if mean > NOTHING * max(means.values())}
        self.expected = {
            kind.format(name): Expected(array, Error.of(array.astype(np.float32), array), Error.worst(errors))
            for (kind, name), array in truth.items()
            if name in kept
            for errors in [[found[kind, name] for found in in_float32]]
        }

    def measure(self, backend: BackendName, precision: PrecisionName) -> dict[str, Error]:
        """A backend's errors, under the names of `expected`; in half precision it takes the truth's routes."""
        engine = EngineConfig(precision=precision)
        trainer = choose_backend(backend).trainer(self._config, self._weights, OPTIMIZER, "cpu", engine)
        state: Arrays = {"step": np.array(STEPS_BEFORE, np.float32)}
        for name, square in self._squares.items():
            state |= {f"m.{name}": np.zeros_like(square), f"v.{name}": square}
        trainer.load_optimizer_state(state)
        with _routed(backend, self._experts_LNK) if precision != "fp32" else nullcontext():
            for _ in range(OVERFLOWS + 1):
                if math.isfinite(trainer.step(self._tokens_BT1, LEARNING_RATE, 0)().grad_norm):
                    break
        moments, weights = trainer.optimizer_state(), trainer.weights()
        found = {GRADIENT.format(name): moments[f"m.{name}"] for name in weights}
        found |= {WEIGHT.format(name): array for name, array in weights.items()}
        return {name: Error.of(found[name], expected.truth) for name, expected in self.expected.items()}

    def _float32(self, order: Plan, truth: Step) -> dict[tuple[str, str], Error]:
        """What a step of the plainest float32 misses, the units of the model in another order."""
        reordered = Oracle(self._config, apply(order, self._weights), np.float32)
        _, gradients = loss_and_gradients(reordered, self._tokens_BT1, self._experts_LNK)
        found = _adamw(reordered, gradients, apply(order, self._squares))
        expected = {kind: apply(order, _of_kind(truth, kind)) for kind in (GRADIENT, WEIGHT)}
        return {(kind, name): Error.of(array, expected[kind][name]) for (kind, name), array in found.items()}


def _adamw(oracle: Oracle, gradients: Gradients, squares: Gradients) -> Step:
    weights, means = adamw_step(oracle, gradients, squares, OPTIMIZER, STEPS_BEFORE + 1, LEARNING_RATE)
    return {(GRADIENT, name): mean for name, mean in means.items()} | {
        (WEIGHT, name): weight for name, weight in weights.items()
    }


def _of_kind(step: Step, kind: str) -> Gradients:
    return {name: array for (of, name), array in step.items() if of == kind}


@contextmanager
def _routed(backend: BackendName, experts_LNK: NDArray[np.int64]) -> Iterator[None]:
    """Every forward pass of a backend takes these experts, layer by layer, whatever its routers say."""
    moe: Any = importlib.import_module({"mlx": "mlx_moe.model.moe", "torch": "torch_ref.moe"}[backend])
    array = moe.mx.array if backend == "mlx" else moe.torch.from_numpy
    layers, own = cycle([array(experts_NK) for experts_NK in experts_LNK]), moe.choose_experts
    moe.choose_experts = lambda router_logits_NE, k: next(layers)
    try:
        yield
    finally:
        moe.choose_experts = own
