"""The proof that a transfer changed nothing: the same tokens through both models, and what came out different.

How different may logits be? Two float32 computations of one function differ by their rounding. That grows with the
logits, and with how much of it the model's layers amplify, which no formula in ε says: SmolLM2-135M, whose logits reach
42, differs from itself by 1.2e-4 on 64 tokens of text, by 6e-4 on 256 random ones. So it is measured. With e₀ and e₁
the errors of the model before, its sums taken in two orders (`reordering.py`), the floor is max |e₀ − e₁|; across a
boundary one sees max |e₀ − e₂|. e₂ has the same sources as e₁, a sum or a scale more per tensor, and weights that
growth rounded once more: at most some three times the variance, so √((1 + 3) / 2) = √2 times the difference is to be
expected. Maxima of few independent amounts vary: MARGIN allows √2 · 2.8 = 4. Measured: upcycling 0.4 to 0.8, growth 0.7
to 1.6 floors (96 transfers of small models). A fault shows where it exceeds a few roundings.

B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens (B, T) to the logits (T, V) of one sequence after the other.
Logits = Callable[[NDArray[np.int32]], Iterable[NDArray[np.float32]]]
MARGIN = 4.0  # times the rounding floor


@dataclass(frozen=True)
class Replay:
    """The model after a transfer, made to visit the experts that the model before it chose."""

    logits: NDArray[np.float32]  # (1, T, V)
    router_difference: float  # the largest |after - before| of the router logits
    flipped: int  # choices (token and layer) that the model after would have made differently


@dataclass(frozen=True)
class Certificate:
    """Differences between two models on the same tokens. Losses are mean cross entropies, nats per token.

    Where two experts tie for a token up to rounding, rounding decides, and the logits jump with the choice. Sequences
    in which that happened are judged with the same experts in both models, and so are the router logits: as long as
    those agree within the limit, nothing but a tie can flip.
    """

    logit_differences: tuple[float, ...]  # per sequence, the largest |after - before|
    max_logit_difference: float
    loss_before: float
    loss_after: float
    loss_jump: float  # after - before
    argmax_agreement: float  # fraction of positions with the same likeliest token
    routing_flips: int  # choices that differ, by ties
    router_difference: float  # in the sequences with flips, the largest of the router logits
    free_logit_difference: float  # max_logit_difference, had every model chosen for itself
    limit_logit_difference: float
    limit_loss_jump: float
    rounding_floor: float | None = None  # where it was measured; then it may have widened the limit of the logits

    @property
    def passed(self) -> bool:
        """Within both limits; what is not finite never is."""
        largest = max(self.max_logit_difference, self.router_difference)
        finite = math.isfinite(self.max_logit_difference) and math.isfinite(self.router_difference)
        return finite and largest <= self.limit_logit_difference and abs(self.loss_jump) <= self.limit_loss_jump

    def to_json(self) -> dict[str, Any]:
        """All figures and the verdict; null stands for what is not finite, which JSON cannot hold."""
        values = asdict(self) | {"logit_differences": [_finite(value) for value in self.logit_differences]}
        return {name: _finite(value) for name, value in values.items()} | {"passed": self.passed}


def probe(
    logits_before: Logits,
    logits_after: Logits,
    batch_BT1: NDArray[np.int32],
    max_logit_difference: float,
    max_loss_jump: float,
    replay: Callable[[NDArray[np.int32]], Replay] | None = None,
    rounding_floor: Callable[[NDArray[np.int32]], float] | None = None,
) -> Certificate:
    """Compare two models on `batch_BT1`.

    Takes one sequence after the other, and sums one position at a time in float64, to keep memory small. Where the
    logits of a sequence differ by more than the limit, `replay` is asked with its tokens (1, T); where that still
    leaves more, so is `rounding_floor`, with the sequence that differs most, and MARGIN times that is the limit if it
    is more. The loss is always that of each model by itself.
    """
    differences, free_differences, losses, agreements = [], [], [], []
    flips, router_difference = 0, 0.0
    tokens_BT = batch_BT1[:, :-1]
    logits = zip(logits_before(tokens_BT), logits_after(tokens_BT), strict=True)
    for tokens_T1, (before_TV, after_TV) in zip(batch_BT1, logits, strict=True):
        differences_T = []
        for before_V, after_V, target in zip(before_TV, after_TV, tokens_T1[1:], strict=True):
            before_V, after_V = before_V.astype(np.float64), after_V.astype(np.float64)
            differences_T.append(max_difference(before_V, after_V))
            losses.append((_cross_entropy(before_V, target), _cross_entropy(after_V, target)))
            agreements.append(before_V.argmax() == after_V.argmax())
        difference = float(np.max(differences_T))
        free_differences.append(difference)
        if replay is not None and difference > max_logit_difference:
            replayed = replay(tokens_T1[None, :-1])
            if replayed.flipped:
                flips += replayed.flipped
                router_difference = float(np.max([router_difference, replayed.router_difference]))
                pairs = zip(before_TV, replayed.logits[0], strict=True)
                difference = float(np.max([max_difference(before_V, after_V) for before_V, after_V in pairs]))
        differences.append(difference)
    limit, floor = max_logit_difference, None
    if rounding_floor is not None and max(differences) > limit:
        floor = rounding_floor(tokens_BT[[int(np.argmax(differences))]])
        limit = max(limit, MARGIN * floor)
    loss_before, loss_after = (float(loss) for loss in np.mean(losses, axis=0))
    return Certificate(
        logit_differences=tuple(differences),
        max_logit_difference=float(np.max(differences)),
        loss_before=loss_before,
        loss_after=loss_after,
        loss_jump=loss_after - loss_before,
        argmax_agreement=float(np.mean(agreements)),
        routing_flips=flips,
        router_difference=router_difference,
        free_logit_difference=float(np.max(free_differences)),
        limit_logit_difference=limit,
        limit_loss_jump=max_loss_jump,
        rounding_floor=floor,
    )


def max_difference(before_V: NDArray[Any], after_V: NDArray[Any]) -> float:
    # Two infinities of one sign would differ by NaN, with a warning; they fail all the same.
    if not (np.isfinite(before_V).all() and np.isfinite(after_V).all()):
        return math.nan
    return float(np.abs(after_V - before_V).max())


def _cross_entropy(logits_V: NDArray[np.float64], target: int) -> float:
    if not np.isfinite(logits_V).all():
        return math.nan
    largest = logits_V.max()
    return float(np.log(np.exp(logits_V - largest).sum()) + largest - logits_V[target])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
