"""Model and training loop of nanoGPT on CPU, written from its published `model.py` and `train.py`, as a reference.

    python benchmarks/nanogpt.py --data tinyshakespeare.txt

Trains its CPU recipe (config/train_shakespeare_char.py with the options of its README for a CPU) and prints the seconds
of the loop and the validation losses. `--eval-batches 20` is the recipe's own setting.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Settings of the CPU recipe."""

    block_size: int = 64
    vocab_size: int = 65
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False


class LayerNorm(nn.Module):
    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def optimizer_of(model: GPT, learning_rate: float, beta2: float, fused: bool = True) -> torch.optim.AdamW:
    """Return AdamW with `fused`; nanoGPT sets it on CUDA only, but it is faster on CPU too."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=fused)


def step(model: GPT, optimizer: torch.optim.AdamW, x: Tensor, y: Tensor, learning_rate: float) -> float:
    """Run one iteration of `train.py`'s loop, without gradient accumulation; return the loss, which it prints."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def batch(data: np.ndarray, config: GPTConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - config.block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + config.block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + config.block_size].astype(np.int64)) for i in starts])
    return x, y


@torch.no_grad()
def estimate_loss(model: GPT, splits: dict[str, np.ndarray], config: GPTConfig, n_batches: int) -> dict[str, float]:
    model.eval()
    losses = {
        name: float(np.mean([model(*batch(data, config, 12))[1].item() for _ in range(n_batches)]))
        for name, data in splits.items()
    }
    model.train()
    return losses


def learning_rate(step: int, steps: int, warm_up: int = 100, highest: float = 1e-3, lowest: float = 1e-4) -> float:
    if step < warm_up:
        return highest * (step + 1) / (warm_up + 1)
    return lowest + 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) * (highest - lowest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--eval-batches", type=int, default=20)
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel, which its own code uses on CUDA")
    options = parser.parse_args()
    text = options.data.read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text], np.uint16)
    splits = {"train": tokens[: int(0.9 * len(tokens))], "val": tokens[int(0.9 * len(tokens)) :]}
    config = GPTConfig(vocab_size=len(ids))
    torch.manual_seed(1337)
    model = GPT(config)
    optimizer = optimizer_of(model, 1e-3, 0.99, options.fused)

    began, evaluating, losses = time.perf_counter(), 0.0, {}
    for i in range(options.steps + 1):
        if i % options.eval_every == 0:
            since = time.perf_counter()
            losses[i] = estimate_loss(model, splits, config, options.eval_batches)["val"]
            evaluating += time.perf_counter() - since
            print(f"step {i}: val loss {losses[i]:.4f}, {time.perf_counter() - began:.1f} s", flush=True)
        if i < options.steps:
            step(model, optimizer, *batch(splits["train"], config, 12), learning_rate(i, options.steps))
    seconds = time.perf_counter() - began
    # Its own estimate uses 20 random batches; evaluate on all held-out text.
    model.eval()
    n = (len(splits["val"]) - 1) // config.block_size
    windows = torch.from_numpy(splits["val"][: n * config.block_size + 1].astype(np.int64))
    with torch.no_grad():
        x, y = windows[:-1].view(n, -1), windows[1:].view(n, -1)
        whole = np.mean([model(a, b)[1].item() for a, b in zip(x.split(60), y.split(60), strict=True)])
    print(json.dumps({"seconds": seconds, "of_which_evaluation": evaluating, "losses": losses, "held_out": whole}))


if __name__ == "__main__":
    main()
