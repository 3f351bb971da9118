"""Certificate that a transfer is lossless: both models' logits and losses on the same tokens.

The limit of the logits' differences is at least ROUNDING_MARGIN times the rounding floor, if that is measured: the
difference between two float32 evaluations of the model before, with sums in different orders (`permutation.py`).
docs/mathematics.md derives the margin, √2 expected times 2.8 for the variation of maxima, and reports measurements:
upcycling 0.4 to 0.8, growth 0.7 to 1.6 floors.

B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Maps tokens (B, T) to the logits (T, V) of each sequence in turn.
LogitsFunction = Callable[[NDArray[np.int32]], Iterable[NDArray[np.float32]]]
ROUNDING_MARGIN = 4.0  # times the rounding floor


@dataclass(frozen=True)
class Replay:
    """Result of the model after a transfer when it uses the experts that the model before it chose."""

    logits: NDArray[np.float32]  # (1, T, V)
    router_difference: float  # largest |after - before| of the router logits
    flipped: int  # choices (token and layer) that the model after would have made differently


@dataclass(frozen=True)
class Certificate:
    """Differences between two models on the same tokens. Losses are mean cross entropies, nats per token.

    If two experts tie for a token up to rounding, rounding decides, and the logits jump with the choice. Sequences with
    such flips are compared with the same experts in both models, and so are the router logits: as long as those agree
    within the limit, only ties can flip.
    """

    logit_differences: tuple[float, ...]  # per sequence, the largest |after - before|
    max_logit_difference: float
    loss_before: float
    loss_after: float
    loss_jump: float  # after - before
    argmax_agreement: float  # fraction of positions with the same most likely token
    routing_flips: int  # number of choices that differ, by ties
    router_difference: float  # largest of the router logits, in the sequences with flips
    free_logit_difference: float  # max_logit_difference with each model's own choices
    limit_logit_difference: float
    limit_loss_jump: float
    rounding_floor: float | None = None  # if measured; it may have raised the logits' limit

    @property
    def passed(self) -> bool:
        """True if both differences are within their limits; non-finite values never are."""
        largest = max(self.max_logit_difference, self.router_difference)
        finite = math.isfinite(self.max_logit_difference) and math.isfinite(self.router_difference)
        return finite and largest <= self.limit_logit_difference and abs(self.loss_jump) <= self.limit_loss_jump

    def to_json(self) -> dict[str, Any]:
        """Return all figures and the verdict; null replaces non-finite values, which JSON cannot represent."""
        values = asdict(self) | {"logit_differences": [_finite(value) for value in self.logit_differences]}
        return {name: _finite(value) for name, value in values.items()} | {"passed": self.passed}


def probe(
    logits_before: LogitsFunction,
    logits_after: LogitsFunction,
    batch_BT1: NDArray[np.int32],
    max_logit_difference: float,
    max_loss_jump: float,
    replay: Callable[[NDArray[np.int32]], Replay] | None = None,
    rounding_floor: Callable[[NDArray[np.int32]], float] | None = None,
) -> Certificate:
    """Compare two models on `batch_BT1`.

    To save memory, sequences are processed one by one, and positions summed one at a time in float64. If the logits of
    a sequence differ by more than the limit, `replay` is called with its tokens (1, T); if the difference still exceeds
    the limit, so is `rounding_floor`, with the sequence that differs most, and the limit is raised to ROUNDING_MARGIN
    times that. Losses are always of each model's own choices.
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
        limit = max(limit, ROUNDING_MARGIN * floor)
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
    # Infinities of the same sign would give NaN with a warning; the result is a failure either way.
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
