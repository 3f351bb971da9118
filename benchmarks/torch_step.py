"""A whole training step on PyTorch (forward, backward, clipping, AdamW), compared with nanoGPT's and transformers'.

    python benchmarks/torch_step.py [--only dense experts] [--rounds 30]

- dense: against nanoGPT's step on the same model and batch, at its CPU recipe's size and at a larger one.
- mixtral: our experts against transformers' Mixtral with the same weights, for each available `experts_implementation`.
- experts: our step with experts over our dense step, beside the ratio of their active FLOPs.

The steps of a comparison are interleaved in one process, with auxiliary losses and fused AdamW. Prints tables and JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch_ref  # noqa: F401  (before torch: sets how torch's threads wait)

# isort: split
import nanogpt
import numpy as np
import torch
from interleaved import medians, show

from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.config import EngineConfig, ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.hub.formats import to_json
from mlx_moe.hub.layout import layout
from mlx_moe.parameters import Arrays, initialize
from mlx_moe.presets import load_architecture
from torch_ref.trainer import Trainer

SIZES = {"nanoGPT's recipe": (4, 128, 64, 12, 65), "larger": (4, 256, 256, 8, 2048)}  # layers, D, T, B, V
NANOGPT = {"activation": "gelu", "normalization": "layernorm_nobias", "bias": False}
MOE = MoEConfig(n_experts=8, top_k=2)
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies weights per assignment: 26 GB


def main() -> None:
    comparisons: dict[str, Callable[[int], None]] = {"dense": dense, "mixtral": mixtral, "experts": experts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(comparisons), nargs="+", default=list(comparisons))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for name in options.only:
        comparisons[name](options.rounds)


def dense(rounds: int) -> None:
    for name, (layers, D, T, B, V) in SIZES.items():
        size = {"context_length": T, "d_model": D, "n_layers": layers, "n_heads": 4, "vocab_size": V}
        ours, tokens_BT1 = trainer(load_architecture("gpt2", **NANOGPT, **size)), batch(B, T, V)
        config = nanogpt.GPTConfig(block_size=T, vocab_size=V, n_layer=layers, n_head=4, n_embd=D)
        model = nanogpt.GPT(config)
        optimizer = nanogpt.optimizer_of(model, 1e-3, 0.99)
        x, y = (torch.from_numpy(tokens_BT1[:, part]).long() for part in (slice(None, -1), slice(1, None)))
        functions = {
            "nanoGPT": lambda m=model, o=optimizer, x=x, y=y: nanogpt.step(m, o, x, y, 1e-3),
            "ours": step(ours, tokens_BT1),
        }
        print(f"\ndense step, {name}")
        show(medians(functions, rounds * (5 if V < 100 else 1)), "nanoGPT", size=size, batch_size=B)


def mixtral(rounds: int) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    B, T, V = 8, 256, 2048
    config = load_architecture(
        "llama", context_length=T, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=V, d_ff=512, moe=MOE
    )
    weights, tokens_BT1 = initialize(config, 0), batch(B, T, V)
    tokens = torch.from_numpy(tokens_BT1).long()
    functions = {"ours": step(trainer(config, weights), tokens_BT1)}
    written = to_json(config, "mixtral", {}) | {"output_router_logits": True, "use_cache": False}
    for implementation in IMPLEMENTATIONS:
        model = MixtralForCausalLM._from_config(
            MixtralConfig(**written), experts_implementation=implementation, attn_implementation="sdpa"
        )
        load(model, config, weights)
        functions[implementation] = their_step(model, tokens)
    print("\nexperts' step, ours and transformers' Mixtral")
    seconds = medians(functions, rounds // 2)
    best = min(IMPLEMENTATIONS, key=lambda name: seconds[name])
    show(seconds, best, config=config.display_name, batch_size=B)


def load(model: Any, config: ModelConfig, weights: Arrays) -> None:
    """Load our weights into transformers' modules, whose experts are stacks (E, gate and up, in) and (E, out, in)."""
    state = {}
    for holder in layout("mixtral", config):
        if holder.expert is None:
            state[holder.name.replace("block_sparse_moe.gate", "mlp.gate")] = torch.tensor(holder.pack(weights))
    for i in range(config.n_layers):
        ours = {p: weights[f"layers.{i}.mlp.experts.{p}_proj.weight"] for p in ("gate", "up", "down")}
        both = np.concatenate([ours["gate"], ours["up"]], axis=1)
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.tensor(both)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = torch.tensor(ours["down"])
    model.load_state_dict(state, strict=True)


def their_step(model: Any, tokens_BT1: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    model.train()
    tokens, targets = tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous()

    def run() -> float:
        out = model(tokens, labels=targets, shift_labels=targets)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss.item()

    return run


def experts(rounds: int) -> None:
    B, T, V = 8, 256, 2048
    size = {"context_length": T, "d_model": 256, "n_layers": 4, "n_heads": 4, "vocab_size": V}
    configs = {name: load_architecture("simple", **size, moe=moe) for name, moe in (("dense", None), ("experts", MOE))}
    flops = {name: flops_per_token(config).training for name, config in configs.items()}
    tokens_BT1 = batch(B, T, V)
    functions = {name: step(trainer(config), tokens_BT1) for name, config in configs.items()}
    seconds = medians(functions, rounds)
    active = flops["experts"] / flops["dense"]
    ratio = seconds["experts"] / seconds["dense"]
    print(f"\nour steps; active FLOPs {active:.3f} to 1, time over that {ratio / active:.3f}")
    show(seconds, "dense", size=size, batch_size=B, active_flops=active)


def trainer(config: ModelConfig, weights: Arrays | None = None) -> Trainer:
    optimizer = OptimizerConfig(betas=(0.9, 0.99))
    return Trainer(config, weights or initialize(config, 0), optimizer, "cpu", EngineConfig(precision="fp32"))


def step(trainer: Trainer, tokens_BT1: np.ndarray) -> Callable[[], float]:
    return lambda: trainer.step(tokens_BT1, 1e-3, 0)().loss


def batch(B: int, T: int, V: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)


if __name__ == "__main__":
    main()
