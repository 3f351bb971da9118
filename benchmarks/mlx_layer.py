"""Forward and backward pass of a mixture-of-experts layer on MLX, compared with alternatives; interleaved.

    python benchmarks/mlx_layer.py [--rounds N] [--tokens N] [--d-model D] [--d-ff F] [--experts E] [--top-k K]

The alternatives: a dense FFN on K times the tokens, mlx-lm's SwitchMLP behind the same router (without our biases), and
the matrix products alone, six of the dense FFN's sizes. Gradients of the input and of all weights. Prints milliseconds
and ratios, then JSON.
"""

import argparse
from collections.abc import Callable
from typing import Any

import mlx_moe.model  # first, so that MLX finds a fast BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_map  # isort: skip
from mlx_lm.models.switch_layers import SwitchMLP  # isort: skip

from interleaved import medians, show  # isort: skip

from mlx_moe.config import ModelConfig, MoEConfig
from mlx_moe.model.device import keep_freed_buffers
from mlx_moe.model.layers import FFN
from mlx_moe.model.moe import MoE, choose_experts, gate_weights


class MlxLm(nn.Module):
    """SwitchMLP of mlx-lm behind our router."""

    def __init__(self, config: ModelConfig, moe: MoEConfig):
        super().__init__()
        self.router = nn.Linear(config.d_model, moe.n_experts, bias=False)
        self.experts = SwitchMLP(config.d_model, config.d_ff, moe.n_experts)
        self._top_k = moe.top_k

    def __call__(self, x_BTD: mx.array) -> mx.array:
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.router(x_ND)
        experts_NK = choose_experts(logits_NE, self._top_k)
        y_NKD = self.experts(x_ND, experts_NK)
        return (y_NKD * gate_weights(logits_NE, experts_NK)[..., None]).sum(axis=1).reshape(x_BTD.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    options = parser.parse_args()
    keep_freed_buffers()  # as in training, where freed buffers are reused
    moe = MoEConfig(n_experts=options.experts, top_k=options.top_k)
    config = ModelConfig(vocab_size=16, d_model=options.d_model, n_heads=1, d_ff=options.d_ff)
    x = mx.random.normal((1, options.tokens, options.d_model))
    functions = {
        "dense FFN, K x the tokens": gradients(FFN(config, config.d_ff), mx.repeat(x, options.top_k, axis=1)),
        "ours": gradients(MoE(config, moe), x, lambda output: output[0]),
        "mlx-lm's SwitchMLP": gradients(MlxLm(config, moe), x),
        "the products alone": products(options.tokens * options.top_k, options.d_model, options.d_ff),
    }
    show(medians(functions, options.rounds), "dense FFN, K x the tokens", blas=mlx_moe.model.FAST_BLAS, **vars(options))


def gradients(layer: nn.Module, x: mx.array, output: Callable[[Any], mx.array] = lambda y: y) -> Callable[[], None]:
    layer.update(tree_map(lambda weight: mx.random.normal(weight.shape) * 0.02, layer.parameters()))
    cotangent = mx.random.normal(x.shape)

    def loss(weights: Any, x: mx.array) -> mx.array:
        layer.update(weights)
        return (output(layer(x)) * cotangent).sum()

    differentiate, weights = mx.compile(mx.value_and_grad(loss, argnums=(0, 1))), layer.parameters()
    mx.eval(weights, x, cotangent)
    return lambda: mx.eval(differentiate(weights, x))


def products(n_rows: int, d_model: int, d_ff: int) -> Callable[[], None]:
    x, hidden, weight = (mx.random.normal(shape) for shape in ((n_rows, d_model), (n_rows, d_ff), (d_ff, d_model)))
    mx.eval(x, hidden, weight)
    return lambda: mx.eval([x @ weight.T, x @ weight.T, hidden @ weight, hidden @ weight, hidden.T @ x, x.T @ hidden])


if __name__ == "__main__":
    main()
