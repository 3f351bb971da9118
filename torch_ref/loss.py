"""The loss by chunks of tokens: logits of a large vocabulary are never all in memory.

B batch, T time, N tokens (B·T, or those of a chunk), D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlx_moe.kernel_sizes import TORCH_LOGITS


def cross_entropy(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, compiled: bool = False) -> Tensor:
    """Return the mean of −log softmax(x·Wᵀ) at the targets, (), float32 nats per token. Products are in x's dtype.

    The gradients are computed along with the loss (Liger Kernel, Hsu et al. 2024), so that a chunk's logits are needed
    once; the graph serves for one backward pass. `compiled`: by torch.compile, but for the products.
    """
    needs_gradients = torch.is_grad_enabled() and x_BTD.requires_grad
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    loss: Tensor = _CrossEntropy.apply(x_ND, weight_VD, targets_N, needs_gradients, compiled)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs_gradients: bool, compiled: bool
    ) -> Tensor:
        n_chunks = -(-len(x_ND) * len(weight_VD) // TORCH_LOGITS["gpu" if x_ND.is_cuda else "cpu"])
        nll_and_gradient = _compiled_nll_and_gradient() if compiled else _nll_and_gradient
        weight = weight_VD.to(x_ND.dtype)
        loss = torch.zeros((), device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND) if needs_gradients else x_ND
        trains_weight = needs_gradients and ctx.needs_input_grad[1]
        grad_weight_VD = torch.empty_like(weight_VD) if trains_weight else None
        chunks = zip(x_ND.chunk(n_chunks), targets_N.chunk(n_chunks), grad_x_ND.chunk(n_chunks), strict=True)
        for i, (x, targets, grad_x) in enumerate(chunks):
            chunk_loss, grad_logits_NV = nll_and_gradient(x @ weight.mT, targets, needs_gradients)
            loss += chunk_loss
            if needs_gradients:
                torch.mm(grad_logits_NV, weight, out=grad_x)
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, grad_logits_NV.mT, x, is_first=i == 0)
        ctx.gradients = (grad_x_ND, grad_weight_VD) if needs_gradients else None
        return loss.div_(len(x_ND))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_weight_VD = ctx.gradients
        del ctx.gradients  # so that the weight's can become its parameter's without a copy
        grad_loss = grad_loss / len(grad_x_ND)
        return (
            grad_x_ND.mul_(grad_loss),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad_loss),
            None,
            None,
            None,
        )


def _nll_and_gradient(logits_NV: Tensor, targets_N: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of −log softmax at the targets in float32, and its gradient, if needed, in the logits' dtype."""
    log_probability_NV = logits_NV.log_softmax(dim=-1, dtype=torch.float32)
    targets_N1 = targets_N[:, None]
    loss = -log_probability_NV.gather(1, targets_N1).sum()
    if needs_gradient:
        log_probability_NV.exp_().scatter_add_(1, targets_N1, log_probability_NV.new_full(targets_N1.shape, -1.0))
    return loss, log_probability_NV.to(logits_NV.dtype)


@cache
def _compiled_nll_and_gradient() -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    return torch.compile(_nll_and_gradient)


def _add_product(sum_VD: Tensor, grad_logits_VN: Tensor, x_ND: Tensor, is_first: bool) -> None:
    """Add a product to `sum_VD` in float32, whatever the dtype of the factors."""
    if x_ND.dtype is sum_VD.dtype:
        sum_VD.addmm_(grad_logits_VN, x_ND, beta=0 if is_first else 1)
    elif is_first:
        sum_VD.copy_(grad_logits_VN @ x_ND)
    else:
        sum_VD.add_(grad_logits_VN @ x_ND)
