"""How far from the truth a backend may be.

Three errors are known of every tensor: that of each backend; the floor, which is what rounding the truth to float32
costs; and what the oracle itself misses in plain float32. A backend's is judged against the other's, and, since two
backends with the same fault agree, against that of plain float32. One that does better than plain float32 does not put
the other in the wrong: for the ratio, the least that counts is what plain float32 misses.

Without a fault, on all presets, dense, with experts and grown, six seeds, RMSEs were at most 1.27 times the other's or
plain float32's, and largest errors 2.8 times; over four seeds, with a cache 1.4 times, gradients 1.75
times the other's.

B batch, T time, N tokens (B·T), E experts, K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_moe.training.backend import Tokens
from parity.oracle import Array
from parity.truth import Error, Expected, Measurement, Statistics, Truth

RATIO_RMSE, RATIO_LARGEST = 2.0, 4.0  # of one backend's error to the other's
FLOAT32_RMSE, FLOAT32_LARGEST = 3.0, 6.0  # of either's to that of plain float32
# For single modules and gradients of a checkpoint, all limits are this many times as wide. The models of the comparison
# are made to show small faults; in one that was hardly trained, numbers are so small that a GELU's last bit is most of
# the error.
CHECKPOINT_SLACK = 2.0
HALF_RMSE, HALF_LARGEST = 3.0, 4.0  # of one backend's error to the other's, where products are in half precision


# own: a module fed the truth's input; whole: in the model run as one; way: its logits with a cache, or row by row;
# step: a gradient, or a weight after AdamW; half: a gradient, the products in bfloat16 or float16.
Scope = Literal["own", "whole", "way", "step", "half"]


@dataclass(frozen=True)
class Judged:
    """One tensor: both backends' errors, what they are judged by, and what is wrong, in words, if anything is."""

    name: str
    scope: Scope
    mlx: Error
    torch: Error
    floor: Error
    float32: Error
    statistics: Statistics
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Margins:
    """Of a layer's router: by how much the last expert chosen beats the next, exact ties aside, in the truth."""

    smallest: float
    median: float
    error: float  # the largest by which both backends' router logits may have moved together


@dataclass(frozen=True)
class Impact:
    """What the difference between the backends means for whoever uses them. Not judged."""

    kl: float  # nats per token, of torch's distribution from MLX's, the mean over tokens
    top1_agreement: float  # fraction of positions with the same likeliest token
    loss_difference: float  # nats per token, MLX − torch
    max_logit_difference: float


@dataclass(frozen=True)
class Verdict:
    """Both backends on one model."""

    tensors: tuple[Judged, ...]  # modules in the order of the forward pass, then router logits, logits, and the rest
    flips: int  # choices of experts that differ from the truth's by no more than the routers' measured errors
    routing_faults: tuple[str, ...]
    margins: tuple[Margins, ...]  # layer by layer
    impact: Impact
    propagated: dict[str, tuple[Error, Error]]  # MLX, torch
    wrong_words: tuple[str, ...] = ()  # what the backends generate and should not

    @property
    def passed(self) -> bool:
        return not self.routing_faults and not self.wrong_words and all(tensor.passed for tensor in self.tensors)

    @property
    def logits(self) -> Judged:
        return next(tensor for tensor in reversed(self.tensors) if tensor.scope == "whole")

    def first_place(self) -> str | None:
        """Where the backends start to differ from the truth: a module, routing, or the whole model; None if nowhere."""
        first = self._first()
        if first is None:
            return "routing" if self.routing_faults else "generation" if self.wrong_words else None
        return f"the whole model ({first.name})" if first.scope == "whole" else first.name

    def first_fault(self) -> str | None:
        """The same in words, with the tensor's statistics."""
        first, place = self._first(), self.first_place()
        if first is None:
            return f"{place}: {'; '.join(self.routing_faults or self.wrong_words)}" if place else None
        if first.scope == "whole":
            place = f"{place}, though every module by itself is right"
        stats = first.statistics
        return (
            f"{place}: {'; '.join(first.faults)}. The truth there: shape {'×'.join(map(str, stats.shape))}, "
            f"mean {stats.mean:.2g}, std {stats.std:.2g}, {stats.smallest:.3g} to {stats.largest:.3g}"
        )

    def _first(self) -> Judged | None:
        return next((tensor for tensor in self.tensors if not tensor.passed), None)


def judge(truth: Truth, mlx: Measurement, torch: Measurement, slack: float = 1.0) -> Verdict:
    """Every module by itself, its limits times `slack`, the routing, and the model as a whole."""
    own = [judge_tensor(name, "own", mlx.own[name], torch.own[name], truth.own[name], slack) for name in truth.inputs]
    whole = [judge_tensor(name, "whole", mlx.whole[name], torch.whole[name], truth.whole[name]) for name in truth.whole]
    allowed_LN = mlx.routes.error_LN + torch.routes.error_LN
    flipped_LN = mlx.routes.flipped_LN | torch.routes.flipped_LN
    faults = []
    for name, routes in (("MLX", mlx.routes), ("torch", torch.routes)):
        if routes.unexplained:
            faults.append(
                f"{name} took other experts than the best by its own router logits {routes.unexplained} times"
            )
    unexcused_LN = flipped_LN & ~(truth.margin_LN <= allowed_LN)
    if unexcused_LN.any():
        layer, token = (int(i) for i in np.argwhere(unexcused_LN)[0])
        faults.append(
            f"{int(unexcused_LN.sum())} choices of experts differ beyond rounding, first in layer {layer} at token "
            f"{token}, where the margin is {truth.margin_LN[layer, token]:.1e} and the routers' errors are "
            f"{allowed_LN[layer, token]:.1e}"
        )
    return Verdict(
        tensors=(*own, *whole),
        flips=int((flipped_LN & ~unexcused_LN).sum()),
        routing_faults=tuple(faults),
        impact=_impact(mlx.logits_BTV, torch.logits_BTV, truth.tokens_BT),
        margins=tuple(_margins(*layer) for layer in zip(truth.margin_LN, allowed_LN, strict=True)),
        propagated={name: (mlx.propagated[name], torch.propagated[name]) for name in mlx.propagated},
    )


def judge_tensor(name: str, scope: Scope, mlx: Error, torch: Error, expected: Expected, slack: float = 1.0) -> Judged:
    """By the other backend's error and, but in half precision, that of plain float32."""
    floor, float32, faults = expected.floor, expected.float32, []
    by_other = (HALF_RMSE, HALF_LARGEST) if scope == "half" else (RATIO_RMSE, RATIO_LARGEST)
    for backend, error, other_backend, other in (("MLX", mlx, "torch", torch), ("torch", torch, "MLX", mlx)):
        for reference, by, limits in (
            (float32, "plain float32 arithmetic", (FLOAT32_RMSE, FLOAT32_LARGEST)),
            (other, other_backend, by_other),
        )[scope == "half" :]:
            ratios, (rmse, largest) = error.times(reference, float32), (slack * limit for limit in limits)
            if not (ratios[0] <= rmse and ratios[1] <= largest):
                faults.append(
                    f"{backend} is {ratios[0]:.3g} times as far from the truth as {by} (RMSE {error.rmse:.1e} against "
                    f"{reference.rmse:.1e}; limit {rmse:g}), at most {ratios[1]:.3g} times (limit {largest:g}), "
                    f"worst at {list(error.place)}: {error.found:.7g} for {error.expected:.7g}"
                )
                break
    return Judged(name, scope, mlx, torch, floor, float32, Statistics.of(expected.truth), tuple(faults))


def _margins(margin_N: Array, allowed_N: Array) -> Margins:
    positive = margin_N[margin_N > 0]
    if not positive.size:
        return Margins(0.0, 0.0, float(allowed_N.max()))
    return Margins(float(positive.min()), float(np.median(positive)), float(allowed_N.max()))


def _impact(mlx_BTV: Array, torch_BTV: Array, tokens_BT: Tokens) -> Impact:
    mlx, torch = log_softmax(mlx_BTV), log_softmax(torch_BTV)
    loss = [float(-np.take_along_axis(x[:, :-1], tokens_BT[:, 1:, None], axis=-1).mean()) for x in (mlx, torch)]
    return Impact(
        kl=float((np.exp(mlx) * (mlx - torch)).sum(-1).mean()),
        top1_agreement=float((mlx.argmax(-1) == torch.argmax(-1)).mean()),
        loss_difference=loss[0] - loss[1],
        max_logit_difference=float(np.abs(mlx_BTV - torch_BTV).max()),
    )


def log_softmax(logits_BTV: Array) -> Array:
    shifted: Array = logits_BTV.astype(np.float64) - logits_BTV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
