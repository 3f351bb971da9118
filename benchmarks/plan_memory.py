"""Accuracy of `mlxmoe plan`: estimated and measured peak memory, each case in its own process.

    python benchmarks/plan_memory.py [--backend mlx|torch] [--device cpu|gpu] [--case NAME …]

Prints a JSON line per case, then a table. PyTorch on CPU is measured by the process's peak resident memory, with every
array of 256 KiB or more in its own mapping, so that freed memory is returned (otherwise glibc keeps up to 40 % more);
PyTorch on CUDA by its allocator's peak, MLX by its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.accounting.memory import step_memory
from mlx_moe.config import RunConfig
from mlx_moe.device import BackendName, DeviceKind
from mlx_moe.parameters import initialize
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.validation import validate

STEPS = 3
LIMIT = 0.15
LLAMA = {"ffn_type": "swiglu", "activation": "silu", "normalization": "rmsnorm", "bias": False}
EXPERTS = {"moe": {"n_experts": 8, "top_k": 2}}


@dataclass(frozen=True)
class Case:
    """A measured model; T is 256 and a head 64 wide by default. `dominates` names the largest part of its memory."""

    dominates: str
    batch_size: int
    model: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def size(d_model: int, n_layers: int, vocab_size: int, **model: Any) -> dict[str, Any]:
    return {
        "d_model": d_model, "n_layers": n_layers, "n_heads": d_model // 64, "vocab_size": vocab_size,
        "context_length": 256, **model,
    }  # fmt: skip


CASES = {
    "dense": Case("activations", 16, size(256, 6, 2048)),
    "dense, Llama": Case("activations", 16, size(256, 6, 2048, **LLAMA)),
    "dense, GPT-2": Case("activations", 12, size(384, 4, 4096, position_encoding="learned_absolute")),
    "dense, grouped queries": Case("activations", 16, size(256, 4, 2048, n_kv_heads=1, **LLAMA)),
    "dense, ReLU, post-norm": Case("activations", 16, size(256, 6, 2048, activation="relu", norm_position="post")),
    "dense, textbook attention": Case("activations", 8, size(256, 6, 2048, attention_backend="manual")),
    "dense, 50k words": Case("vocabulary", 4, size(256, 2, 50257)),
    "dense, 50k words, untied": Case("vocabulary", 4, size(256, 2, 50257, weight_tying=False)),
    "dense, large": Case("weights", 1, size(512, 20, 8192)),
    "experts": Case("activations", 8, size(256, 4, 2048, **EXPERTS)),
    "experts, Llama": Case("activations", 8, size(256, 4, 2048, **EXPERTS, **LLAMA)),
    "experts, 50k words": Case("vocabulary", 4, size(256, 2, 50257, **EXPERTS)),
    "experts, large": Case("weights", 1, size(384, 6, 4096, **EXPERTS)),
    "experts, updated in parts": Case("weights", 1, size(768, 8, 8192, **EXPERTS)),
    "dense, large, Muon": Case("weights", 1, size(512, 20, 8192), optimizer={"name": "muon"}),
    "experts, large, Muon": Case("weights", 1, size(384, 6, 4096, **EXPERTS), optimizer={"name": "muon"}),
    "dense, in 4 parts": Case("activations", 32, size(256, 6, 2048), {"accumulation_steps": 4}),
    "dense, recomputed": Case("activations", 16, size(256, 6, 2048), {"activation_checkpointing": True}),
    "experts, recomputed": Case("activations", 8, size(256, 4, 2048, **EXPERTS), {"activation_checkpointing": True}),
    "dense, bf16": Case("activations", 16, size(256, 6, 2048), {"precision": "bf16"}),
    "experts, bf16": Case("activations", 8, size(256, 4, 2048, **EXPERTS), {"precision": "bf16"}),
}


def run_config(case: Case) -> RunConfig:
    engine = {"precision": "fp32"} | case.engine
    batch = {"batch_size": case.batch_size}
    return validate(RunConfig, {"model": case.model, "engine": engine, "optimizer": case.optimizer, "training": batch})


def measure(name: str, backend: BackendName, device: DeviceKind) -> int:
    """Return the peak of a few steps, in bytes, in this process."""
    run = run_config(CASES[name])
    trainer = choose_backend(backend).trainer(
        run.model, initialize(run.model, 0), run.optimizer, device, engine=run.engine
    )
    shape = (run.training.batch_size, run.model.context_length + 1)
    tokens_BT1 = np.random.default_rng(0).integers(0, run.model.vocab_size, shape).astype(np.int32)
    for _ in range(STEPS):
        trainer.step(tokens_BT1, 1e-4, 0)()
    return trainer.peak_memory_bytes()


def compare(name: str, backend: BackendName, device: DeviceKind) -> dict[str, Any]:
    run = run_config(CASES[name])
    estimate = step_memory(run.model, run.optimizer, run.engine, run.training.batch_size, backend, device)
    command = [sys.executable, __file__, "--measure", name, "--backend", backend, "--device", device]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(256 << 10), "PYTHONPATH": str(Path(__file__).parents[1])
    }  # fmt: skip
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    measured = int(output.split()[-1])
    return {
        "case": name,
        "backend": backend,
        "device": device,
        "dominates": CASES[name].dominates,
        "estimated": estimate.peak,
        "measured": measured,
        "ratio": round(estimate.peak / measured, 3),
        "peak_moment": estimate.peak_moment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["mlx", "torch"], action="append")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.backend[0], options.device))
        return
    rows = []
    for backend in options.backend or ["torch", "mlx"]:
        for name in options.case or CASES:
            rows.append(compare(name, backend, options.device))
            print(json.dumps(rows[-1]), flush=True)
    console = Console()
    console.table(
        ["case", "backend", "dominates", "estimated MB", "measured MB", "ratio"],
        [
            [row["case"], row["backend"], row["dominates"], f"{row['estimated'] / 1e6:.0f}",
             f"{row['measured'] / 1e6:.0f}", f"{row['ratio']:.2f}"]
            for row in rows
        ],
    )  # fmt: skip
    within = sum(abs(row["ratio"] - 1) <= LIMIT for row in rows)
    console.line(f"{within} of {len(rows)} within {100 * LIMIT:.0f} %")


if __name__ == "__main__":
    main()
