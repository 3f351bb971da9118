"""One training step against the truth: every gradient, and every weight after AdamW."""

from __future__ import annotations

import numpy as np

from mlx_moe.config import EngineConfig, ModelConfig, OptimizerConfig
from mlx_moe.parameters import Arrays, Weights
from mlx_moe.precision import PrecisionName
from mlx_moe.training.backend import Tokens, choose_backend
from parity.decoding import settled
from parity.gradients import adamw_step, loss_and_gradients
from parity.oracle import Oracle
from parity.truth import Error, Expected, Truth
from parity.yardstick import Judged, Scope, judge_tensor

TOKENS = 64
TRIES = 8
# Errors pile up on the way back, and some gradients are small differences of large numbers: of 1,446 tensors of all
# architectures, over four seeds, one was 2.13 times as far from the truth as the other backend's.
FLOAT32_SLACK = 2.0
STEPS_BEFORE = 10  # so that AdamW's corrections count
LEARNING_RATE = 1e-2
NOTHING = 1e-10  # of the largest gradient
# Gradients are read off the first moments, which start at 0; the second start where they make steps of all sizes.
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)


def judge_step(config: ModelConfig, weights: Weights, tokens_BT1: Tokens, slack: float = 1.0) -> list[Judged]:
    """Every gradient and every weight after a step; without experts, the gradients in bfloat16, too.

    `slack` widens all limits.
    """
    truth, judged = StepTruth(config, weights, tokens_BT1), []
    runs: list[tuple[Scope, PrecisionName]] = [("step", "fp32"), ("bf16", "bf16")]
    for scope, precision in runs:
        if scope == "step" or config.moe is None:  # rounded to bfloat16, tokens go to other experts
            mlx, torch = (truth.measure(backend, precision) for backend in ("mlx", "torch"))
            judged += [
                judge_tensor(
                    f"{name}{' in bf16' * (scope == 'bf16')}",
                    scope,
                    mlx[name],
                    torch[name],
                    expected,
                    max(slack, FLOAT32_SLACK if scope == "step" else 1.0),
                )
                for name, expected in truth.expected.items()
                if scope == "step" or name.startswith("gradient")
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


class StepTruth:
    """What one step should make of a model, from tokens (B, T + 1).

    `expected`: by "gradient of …", which is AdamW's first moment, and "… after a step". Without what has no gradient
    and therefore only rounding: a bias of keys that are not rotated, which softmax does not notice.
    """

    def __init__(self, config: ModelConfig, weights: Weights, tokens_BT1: Tokens):
        self._config, self._weights, self._tokens_BT1 = config, weights, tokens_BT1
        exact, plain = (Oracle(config, weights, dtype) for dtype in (np.float64, np.float32))
        self.loss, gradients = loss_and_gradients(exact, tokens_BT1)
        _, in_float32 = loss_and_gradients(plain, tokens_BT1)
        rng = np.random.default_rng(0)
        self._squares = {
            name: (np.square(gradient).mean() * rng.uniform(0.2, 2, gradient.shape)).astype(np.float32)
            for name, gradient in gradients.items()
        }
        found = [
            adamw_step(oracle, of, self._squares, OPTIMIZER, STEPS_BEFORE + 1, LEARNING_RATE)
            for oracle, of in ((exact, gradients), (plain, in_float32))
        ]
        (after, means), (after32, means32) = found
        largest = max(np.abs(mean).max() for mean in means.values())
        names = [name for name, mean in means.items() if np.abs(mean).max() > NOTHING * largest]
        self.expected = {f"gradient of {name}": Expected.of(means[name], means32[name]) for name in names}
        self.expected |= {f"{name} after a step": Expected.of(after[name], after32[name]) for name in names}

    def measure(self, backend: str, precision: PrecisionName) -> dict[str, Error]:
        """A backend's errors, under the names of `expected`."""
        engine = EngineConfig(precision=precision)
        trainer = choose_backend(backend).trainer(self._config, OPTIMIZER, self._weights, "cpu", engine)
        state: Arrays = {"step": np.array(STEPS_BEFORE, np.float32)}
        for name, square in self._squares.items():
            state |= {f"m.{name}": np.zeros_like(square), f"v.{name}": square}
        trainer.load_optimizer_state(state)
        trainer.step(self._tokens_BT1, LEARNING_RATE, 0)()
        moments, weights = trainer.optimizer_state(), trainer.weights()
        found = {f"gradient of {name}": moments[f"m.{name}"] for name in weights}
        found |= {f"{name} after a step": array for name, array in weights.items()}
        return {name: Error.of(found[name], expected.truth) for name, expected in self.expected.items()}
