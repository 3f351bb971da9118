"""Training step on MLX, PyTorch, mlx-lm and the stock wheel; each in its own process, interleaved.

    python benchmarks/mlx_step.py [--rounds N] [--only NAME,NAME] [--layers L] [--d-model D] [--vocabulary V] ...

Dense and MoE (8 experts, top-2), forward, backward, clipping and AdamW, float32. `stock` is mlx-lm's Llama with MLX's
own step as in its trainer, on the BLAS of the Linux wheel; `mlx-lm` is the same on the fast BLAS. Both have the Llama
architecture, so `mlx-llama` is their counterpart. Prints milliseconds and ratios, then JSON.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from interleaved import Child, medians, serve, show

from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import choose_backend

LLAMA = {"normalization": "rmsnorm", "activation": "silu", "ffn_type": "swiglu", "bias": False}
KINDS = ("mlx", "torch", "mlx-moe", "torch-moe", "mlx-llama", "mlx-lm", "stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(KINDS[:-1]), help="of " + ", ".join(KINDS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(step_of(options.child, options))
        return
    kinds = options.only.split(",")
    children = {kind: Child(*sys.argv[1:], "--child", kind) for kind in kinds}
    seconds = medians(children, options.rounds)
    show(seconds, kinds[0], **vars(options))
    for backend in ("mlx", "torch"):
        if {backend, f"{backend}-moe"} <= set(kinds):
            operations = [flops_per_token(config_of(kind, options)).training for kind in (f"{backend}-moe", backend)]
            ratio = seconds[f"{backend}-moe"] / seconds[backend]
            print(f"{backend}: MoE over dense {ratio:.2f}, by active operations {operations[0] / operations[1]:.2f}")


def config_of(kind: str, options: argparse.Namespace) -> ModelConfig:
    sizes = {"vocab_size": options.vocabulary, "context_length": options.context, "n_layers": options.layers}
    sizes |= {"d_model": options.d_model, "n_heads": options.heads}
    moe = MoEConfig(n_experts=8, top_k=2) if kind.endswith("-moe") else None
    return ModelConfig(**sizes, moe=moe, **(LLAMA if kind in ("mlx-llama", "mlx-lm", "stock") else {}))


def step_of(kind: str, options: argparse.Namespace) -> Callable[[], Any]:
    config = config_of(kind, options)
    shape = (options.batch, options.context + 1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    if kind in ("mlx-lm", "stock"):
        return mlx_lm_step(config, tokens, fast_blas=kind == "mlx-lm")
    trainer = choose_backend(kind.partition("-")[0]).trainer(config, initialize(config, 0), OptimizerConfig(), "cpu")
    return lambda: trainer.step(tokens, 1e-4, 0)()


def mlx_lm_step(config: ModelConfig, tokens: np.ndarray, fast_blas: bool) -> Callable[[], None]:
    if fast_blas:
        import mlx_moe.model  # noqa: F401  # before MLX
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.trainer import default_loss

    mx.set_default_device(mx.cpu)
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        intermediate_size=config.d_ff,
        num_attention_heads=config.n_heads,
        rms_norm_eps=config.norm_eps,
        vocab_size=config.vocab_size,
        tie_word_embeddings=True,
    )
    model = Model(arguments)
    optimizer = optim.AdamW(1e-4)
    batch, lengths = mx.array(tokens), mx.array([[0, tokens.shape[1]]] * len(tokens))
    state = [model.state, optimizer.state, mx.random.state]
    differentiate = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step() -> mx.array:
        (loss, _), gradients = differentiate(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss

    return lambda: mx.eval(step(), state)


if __name__ == "__main__":
    main()
