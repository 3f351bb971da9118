"""The loss by chunks of tokens: logits of a large vocabulary are never all in memory.

B batch, T time, N tokens (B·T), C tokens of a chunk, D model, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_moe.kernel_sizes import MLX_LOGITS
from mlx_moe.model.cpu.elementwise import with_vjp
from mlx_moe.model.functional import linear, logsumexp, on_cpu


def cross_entropy(
    x_BTD: mx.array, weight_VD: mx.array, targets_BT: mx.array, needs_gradients: bool = False
) -> mx.array:
    """Return the mean of −log softmax(x·Wᵀ) at the targets, (), float32 nats per token. Products are in x's dtype.

    Gradients are computed along with the loss (Liger Kernel, Hsu et al. 2024), so a chunk's logits are needed once.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    if targets_N.size <= _chunk_size(weight_VD):
        return _sum(x_ND, weight_VD, targets_N) / targets_N.size
    if needs_gradients:
        total, *_ = _sum_and_gradients(x_ND, weight_VD, targets_N)
        return total / targets_N.size
    sums: list[mx.array] = []
    for x_CD, targets_C in _chunks(x_ND, weight_VD, targets_N):
        sums.append(_sum(wait_for(x_CD, sums), weight_VD, targets_C))
    return mx.stack(sums).sum() / targets_N.size


def _forward(x_ND: mx.array, weight_VD: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    differentiate = mx.value_and_grad(_sum, argnums=(0, 1))
    sums: list[mx.array] = []
    grad_x: list[mx.array] = []
    grad_weight_VD = mx.zeros_like(weight_VD)
    for x_CD, targets_C in _chunks(x_ND, weight_VD, targets_N):
        chunk_sum, (grad_x_CD, chunk_grad_weight_VD) = differentiate(wait_for(x_CD, sums), weight_VD, targets_C)
        grad_weight_VD = grad_weight_VD + chunk_grad_weight_VD
        grad_x.append(grad_x_CD)
        sums.append(mx.depends(chunk_sum, [grad_weight_VD, grad_x_CD]))
    return mx.stack(sums).sum(), mx.concatenate(grad_x), grad_weight_VD


def _backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> tuple[mx.array, ...]:
    _, grad_x_ND, grad_weight_VD = outputs
    return grad_x_ND * cotangents[0].astype(grad_x_ND.dtype), grad_weight_VD * cotangents[0], mx.zeros_like(primals[2])


_sum_and_gradients = with_vjp(_forward, _backward)


def _sum(x_CD: mx.array, weight_VD: mx.array, targets_C: mx.array) -> mx.array:
    logits_CV = linear(x_CD, weight_VD).astype(mx.float32)
    chosen_C = mx.take_along_axis(logits_CV, targets_C[:, None], axis=-1).squeeze(-1)
    return (logsumexp(logits_CV) - chosen_C).sum()


def _chunk_size(weight_VD: mx.array) -> int:
    return max(1, MLX_LOGITS["cpu" if on_cpu() else "gpu"] // weight_VD.shape[0])


def _chunks(x_ND: mx.array, weight_VD: mx.array, targets_N: mx.array) -> list[tuple[mx.array, mx.array]]:
    ends = list(range(_chunk_size(weight_VD), targets_N.size, _chunk_size(weight_VD)))
    return list(zip(mx.split(x_ND, ends), mx.split(targets_N, ends), strict=True))


def wait_for(x: mx.array, others: list[mx.array]) -> mx.array:
    """Make `x` depend on `others`, so that MLX runs the chunks one by one."""
    return mx.depends(x, others) if others else x
