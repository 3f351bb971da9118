"""Judge both backends' errors on one model by the tolerances.

B batch, T time, N tokens (B·T), L layers with experts, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from mlx_moe.training.backend import Tokens
from parity.numpy_model import Array
from parity.reference_forward import Expected, Measurement, ReferenceForward
from parity.report import (
    BackendDifference,
    ModelVerdict,
    RoutingMargins,
    Scope,
    TensorError,
    TensorStatistics,
    TensorVerdict,
)
from parity.tolerances import TO_FLOAT32, TO_OTHER, TO_OTHER_IN_HALF


def judge(reference: ReferenceForward, mlx: Measurement, torch: Measurement, slack: float = 1.0) -> ModelVerdict:
    """Judge every module by itself, the routing, and the whole model. `slack` widens the limits of single modules."""
    modules = [
        judge_tensor(name, "module", mlx.modules[name], torch.modules[name], reference.modules[name], slack)
        for name in reference.inputs
    ]
    model = [
        judge_tensor(name, "model", mlx.model[name], torch.model[name], reference.model[name])
        for name in reference.model
    ]
    allowed_LN = mlx.routes.error_LN + torch.routes.error_LN
    flipped_LN = mlx.routes.flipped_LN | torch.routes.flipped_LN
    faults = []
    for name, routes in (("MLX", mlx.routes), ("torch", torch.routes)):
        if routes.unexplained:
            faults.append(
                f"{routes.unexplained} times {name} chose experts that its own router logits do not rank best"
            )
    unexcused_LN = flipped_LN & ~(reference.margin_LN <= allowed_LN)
    if unexcused_LN.any():
        layer, token = (int(i) for i in np.argwhere(unexcused_LN)[0])
        faults.append(
            f"{int(unexcused_LN.sum())} choices of experts differ beyond rounding, first in layer {layer} at token "
            f"{token}, where the margin is {reference.margin_LN[layer, token]:.1e} and the routers' errors are "
            f"{allowed_LN[layer, token]:.1e}"
        )
    return ModelVerdict(
        tensors=(*modules, *model),
        flips=int((flipped_LN & ~unexcused_LN).sum()),
        routing_faults=tuple(faults),
        impact=_difference(mlx.logits_BTV, torch.logits_BTV, reference.tokens_BT),
        margins=tuple(_margins(*layer) for layer in zip(reference.margin_LN, allowed_LN, strict=True)),
        propagated={name: (mlx.propagated[name], torch.propagated[name]) for name in mlx.propagated},
    )


def judge_tensor(
    name: str, scope: Scope, mlx: TensorError, torch: TensorError, expected: Expected, slack: float = 1.0
) -> TensorVerdict:
    """Judge a tensor by the other backend's error and, except in half precision, by that of plain float32."""
    float32, faults, in_half = expected.float32, [], scope == "half"
    for backend, error, other_backend, other in (("MLX", mlx, "torch", torch), ("torch", torch, "MLX", mlx)):
        if not math.isfinite(error.rmse):  # two errors that are both infinite would have the ratio 1
            faults.append(f"{backend}'s error is not finite, at {list(error.place)}: {error.found:.7g}")
            continue
        for standard, words, tolerance in (
            (float32, "plain float32", TO_FLOAT32),
            (other, other_backend, TO_OTHER_IN_HALF if in_half else TO_OTHER),
        )[in_half:]:
            ratios, limits = error.ratios_to(standard, float32), tolerance.widened(slack)
            if not limits.allows(ratios):
                faults.append(
                    f"{backend}'s error is {ratios[0]:.3g} times that of {words} (RMSE {error.rmse:.1e} against "
                    f"{standard.rmse:.1e}; limit {limits.rmse:g}), the largest {ratios[1]:.3g} times (limit "
                    f"{limits.largest:g}), at {list(error.place)}: {error.found:.7g} instead of {error.expected:.7g}"
                )
                break
    statistics = TensorStatistics.of(expected.exact)
    return TensorVerdict(name, scope, mlx, torch, expected.floor, float32, statistics, tuple(faults))


def log_softmax(logits: Array) -> Array:
    """Return log probabilities (..., V) in float64."""
    shifted: Array = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _margins(margin_N: Array, allowed_N: Array) -> RoutingMargins:
    positive = margin_N[margin_N > 0]
    if not positive.size:
        return RoutingMargins(0.0, 0.0, float(allowed_N.max()))
    return RoutingMargins(float(positive.min()), float(np.median(positive)), float(allowed_N.max()))


def _difference(mlx_BTV: Array, torch_BTV: Array, tokens_BT: Tokens) -> BackendDifference:
    mlx, torch = log_softmax(mlx_BTV), log_softmax(torch_BTV)
    loss = [float(-np.take_along_axis(x[:, :-1], tokens_BT[:, 1:, None], axis=-1).mean()) for x in (mlx, torch)]
    return BackendDifference(
        kl=float((np.exp(mlx) * (mlx - torch)).sum(-1).mean()),
        top1_agreement=float((mlx.argmax(-1) == torch.argmax(-1)).mean()),
        loss_difference=loss[0] - loss[1],
        max_logit_difference=float(np.abs(mlx_BTV - torch_BTV).max()),
    )
