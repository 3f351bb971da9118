"""Description of a run, printed before it trains."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_moe.config import OptimizerConfig, RunConfig
from mlx_moe.data.tokens import TokenData
from mlx_moe.training.backend import Backend, Trainer, peak_flops_per_s


def summary_rows(
    run: RunConfig, folder: Path, data: TokenData, backend: Backend, trainer: Trainer
) -> list[tuple[str, str]]:
    """Return names and descriptions: the run, its start, backend, hardware, precision, optimizer, data."""
    tokens = {name: data.provenance[name]["tokens"] for name in ("train", "validation")}
    world = trainer.world
    processes = f"; {world.size} processes, {run.engine.strategy}" if world.size > 1 else ""
    return [
        ("run", f"{run.name}, seed {run.seed}, in {folder}"),
        *([("start", f"{', '.join(run.start.lineage)}, from {run.start.model}")] if run.start else []),
        ("backend", f"{backend.reason}; device {trainer.device.label}{processes}"),
        ("hardware", _hardware(backend, trainer)),
        ("precision", trainer.precision.reason),
        ("optimizer", _optimizer(run.optimizer)),
        ("data", data.provenance["source"]["description"]),
        ("tokens", f"{tokens['train']:,} to train on, {tokens['validation']:,} held out"),
        ("tokenizer", f"{run.data.tokenizer}, {data.tokenizer.vocab_size:,} tokens"),
    ]


def _hardware(backend: Backend, trainer: Trainer) -> str:
    device, peak = trainer.device, peak_flops_per_s(backend, trainer.precision.name, trainer.device)
    cores = f", {os.cpu_count()} cores" if device.kind == "cpu" else ""
    memory = f"{backend.device.usable_bytes(device) / 1e9:.1f} GB usable"
    name = backend.device.device_name(device)
    return f"{name}{cores}, {memory}, {peak / 1e12:.3g} TFLOP/s at best in {trainer.precision.name}"


def _optimizer(optimizer: OptimizerConfig) -> str:
    beta_1, beta_2 = optimizer.betas
    adamw = f"AdamW (betas {beta_1:g} and {beta_2:g}, eps {optimizer.eps:g})"
    rule = adamw if optimizer.name == "adamw" else f"Muon (momentum {optimizer.momentum:g}) and {adamw}"
    return f"{rule}, weight decay {optimizer.weight_decay:g}, gradients clipped at {optimizer.max_grad_norm:g}"
