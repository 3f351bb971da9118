"""Experts on blocks of rows, padded to whole blocks.

N tokens, D model, E experts, K experts per token, A assignments (N·K).
P rows of the blocked layout: the assignments sorted by expert, each expert's padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_moe.kernel_sizes import MLX_EXPERT_ROWS
from mlx_moe.model.cpu.elementwise import with_vjp


def dispatch_padded(
    ffn: Callable[[mx.array, mx.array], mx.array], x_ND: mx.array, experts_NK: mx.array, n_experts: int
) -> mx.array:
    """Run the experts on groups of MLX_EXPERT_ROWS rows. Returns (N, K, D).

    There are A / MLX_EXPERT_ROWS + E blocks, so shapes do not depend on the routing.
    """
    expert_A = experts_NK.flatten()
    is_expert_AE = (expert_A[:, None] == mx.arange(n_experts)).astype(mx.int32)
    rank_A = mx.take_along_axis(mx.cumsum(is_expert_AE, axis=0), expert_A[:, None], axis=1)[:, 0] - 1
    blocks_E = (is_expert_AE.sum(axis=0) + MLX_EXPERT_ROWS - 1) // MLX_EXPERT_ROWS
    last_block_E = mx.cumsum(blocks_E)
    row_A = (last_block_E - blocks_E)[expert_A] * MLX_EXPERT_ROWS + rank_A

    n_assignments = expert_A.size
    n_blocks = -(-n_assignments // MLX_EXPERT_ROWS) + n_experts
    assignment_P = mx.full((n_blocks * MLX_EXPERT_ROWS,), n_assignments, dtype=mx.int32)  # n_assignments: padding
    assignment_P = mx.put_along_axis(assignment_P, row_A, mx.arange(n_assignments, dtype=mx.int32), axis=0)
    row_NK = row_A.reshape(experts_NK.shape)
    x_blocks = to_rows(x_ND, row_NK, assignment_P).reshape(n_blocks, MLX_EXPERT_ROWS, -1)
    expert_of_block = (mx.arange(n_blocks)[:, None] >= last_block_E).astype(mx.int32).sum(axis=1)
    y_blocks = ffn(x_blocks, mx.minimum(expert_of_block, n_experts - 1))
    return from_rows(y_blocks.flatten(0, 1), row_NK, assignment_P)


def gathered_products(x: mx.array, weight: mx.array, expert: mx.array) -> mx.array:
    """Multiply x (M, rows, in), each group by its expert's weight (E, out, in); experts in rising order."""
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=expert, sorted_indices=True)


def _products_vjp(primals: list[mx.array], gradient: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """Compute the weights' gradient by one product for each expert; MLX's own builds a matrix for each block."""
    x, weight, expert = primals
    end_E = (expert[:, None] <= mx.arange(weight.shape[0])).astype(mx.uint32).sum(axis=0) * x.shape[1]
    segments_E2 = mx.stack([mx.concatenate([mx.zeros((1,), mx.uint32), end_E[:-1]]), end_E], axis=1)
    weight_gradient = mx.segmented_mm(gradient.flatten(0, 1).T, x.flatten(0, 1), segments_E2)
    x_gradient = mx.gather_mm(gradient, weight, rhs_indices=expert, sorted_indices=True)
    return x_gradient, weight_gradient, mx.zeros_like(expert)


def _rows(x_ND: mx.array, row_NK: mx.array, assignment_P: mx.array) -> mx.array:
    """Gather the rows of the blocked layout, (P, D)."""
    return _with_zeros(x_ND)[assignment_P // row_NK.shape[1]]


def _rows_vjp(primals: list[mx.array], gradient_PD: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, row_NK, assignment_P = primals
    return gradient_PD[row_NK].sum(axis=1), mx.zeros_like(row_NK), mx.zeros_like(assignment_P)


def _assigned(y_PD: mx.array, row_NK: mx.array, assignment_P: mx.array) -> mx.array:
    """Gather the assignments' rows out of the blocked layout, (N, K, D)."""
    return y_PD[row_NK]


def _assigned_vjp(primals: list[mx.array], gradient_NKD: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    _, row_NK, assignment_P = primals
    gradient_PD = _with_zeros(gradient_NKD.flatten(0, 1))[assignment_P]
    return gradient_PD, mx.zeros_like(row_NK), mx.zeros_like(assignment_P)


def _with_zeros(x: mx.array) -> mx.array:
    """Append a row of zeros, which padding reads."""
    return mx.concatenate([x, mx.zeros((1, x.shape[1]), dtype=x.dtype)])


block_products = with_vjp(gathered_products, _products_vjp)
# Each is the other's transpose, so that gradients are gathered too: MLX's CPU adds scattered rows one number at a time.
to_rows, from_rows = with_vjp(_rows, _rows_vjp), with_vjp(_assigned, _assigned_vjp)
