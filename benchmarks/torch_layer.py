"""A mixture-of-experts layer on PyTorch against its lower bound: a dense FFN over the tokens times top_k.

    python benchmarks/torch_layer.py

Forward and backward, including the input's gradient; 8 experts, top-2, 2,048 tokens, d 256, ffn 1,024, the default
activation, with and without biases. `products` are the dense FFN's matrix products alone. Prints tables and JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch_ref  # noqa: F401  (before torch: sets how torch's threads wait)

# isort: split
import torch
from interleaved import medians, show
from torch import Tensor, nn

from mlx_moe.config import ModelConfig, MoEConfig
from torch_ref.layers import FFN
from torch_ref.moe import MoE

N_TOKENS = 2048
MOE = MoEConfig(n_experts=8, top_k=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for bias in (True, False):
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=2, d_model=256, n_layers=1, n_heads=4, d_ff=1024, bias=bias)
        moe, dense = MoE(config, MOE), FFN(config, config.d_ff)
        for parameter in [*moe.parameters(), *dense.parameters()]:
            nn.init.normal_(parameter, std=0.02)
        moe, dense = moe.to(options.device), dense.to(options.device)
        x = torch.randn(1, N_TOKENS, config.d_model, device=options.device, dtype=dtype)
        functions = {
            "dense FFN, 2 x the tokens": both_ways(dense, torch.cat([x, x], dim=1)),
            "experts": both_ways(lambda x, moe=moe: moe(x)[0], x),
            "products": products(dense, torch.cat([x, x], dim=1)),
        }
        seconds = medians(functions, options.rounds, warm_up=3)
        show(seconds, "dense FFN, 2 x the tokens", bias=bias, dtype=options.dtype, device=options.device)


def both_ways(layer: Callable[[Tensor], Tensor], x_BTD: Tensor) -> Callable[[], None]:
    """Return forward and backward on leaves without gradients, as in a step."""
    x_BTD = x_BTD.clone().requires_grad_()
    by_output = torch.randn_like(x_BTD)
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else list(layer.__defaults__[0].parameters())

    def run() -> None:
        for leaf in [x_BTD, *parameters]:
            leaf.grad = None
        layer(x_BTD).backward(by_output)
        wait(x_BTD)

    return run


def products(dense: FFN, x_BTD: Tensor) -> Callable[[], None]:
    x, up, down = x_BTD[0], dense.up_proj.weight.detach().to(x_BTD), dense.down_proj.weight.detach().to(x_BTD)

    def run() -> None:
        hidden = x @ up.T
        y = hidden @ down.T
        by_hidden = y @ down
        for product in (y.T @ hidden, by_hidden @ up, by_hidden.T @ x):
            wait(product)

    return run


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
