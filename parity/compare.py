"""MLX against PyTorch on the same weights and tokens: logits, loss, and logits across each boundary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_moe.config import ModelConfig, MoEConfig, OptimizerConfig, VerificationConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.models import is_model_folder, open_model, probe_tokens
from mlx_moe.parameters import Arrays, initialize, normal
from mlx_moe.presets import load_architecture, preset_names
from mlx_moe.training import checkpoint
from mlx_moe.training.backend import Tokens, Trainer, choose_backend
from mlx_moe.training.boundary import certify, random_probes
from mlx_moe.transfer.certificate import Certificate
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import Plan
from mlx_moe.transfer.upcycling import plan_upcycling

LIMITS = VerificationConfig(probe_sequences=4)  # fp32; those of a boundary


@dataclass(frozen=True)
class Comparison:
    """The certificates of one model: MLX against PyTorch, and of each across the boundary that led to it."""

    subject: str
    architecture: str
    backends: Certificate
    boundary_mlx: Certificate | None = None
    boundary_torch: Certificate | None = None

    @property
    def certificates(self) -> dict[str, Certificate]:
        """Those that there are, by name."""
        named = {
            "backends": self.backends,
            "boundary_mlx": self.boundary_mlx,
            "boundary_torch": self.boundary_torch,
        }
        return {name: certificate for name, certificate in named.items() if certificate is not None}

    @property
    def passed(self) -> bool:
        return all(certificate.passed for certificate in self.certificates.values())


@dataclass(frozen=True)
class Pair:
    """The same weights in both backends."""

    mlx: Trainer
    torch: Trainer

    @staticmethod
    def build(config: ModelConfig, weights: Arrays) -> Pair:
        """Raises InputError where a backend is not installed. On CPU both compute in full float32."""
        trainers = [
            choose_backend(name).trainer(config, OptimizerConfig(), weights, "cpu") for name in ("mlx", "torch")
        ]
        return Pair(*trainers)

    def transferred(self, plan: Plan) -> Pair:
        """The plan executed by each backend for itself."""
        return Pair(self.mlx.transferred(plan), self.torch.transferred(plan))


def compare_architectures(names: Sequence[str], seed: int) -> Iterator[Comparison]:
    """Small fresh models of the architecture presets (all, if none is named): dense, upcycled, grown."""
    for name in names or preset_names("architectures"):
        config = small_model(name)
        pair = Pair.build(config, rough_weights(config, seed))
        yield _compare(f"{name}, dense", pair, None)
        upcycled = pair.transferred(plan_upcycling(config, MoEConfig(n_experts=4), seed=seed))
        yield _compare(f"{name}, experts", upcycled, pair)
        plan = plan_growth(upcycled.mlx.config, larger_model(upcycled.mlx.config), seed=seed)
        yield _compare(f"{name}, grown", upcycled.transferred(plan), upcycled)


def compare_checkpoints(path: Path) -> Iterator[Comparison]:
    """One checkpoint; or all phases of a run, each one's birth with the boundary behind it, and its end."""
    if (path / checkpoint.MANIFEST).is_file() or is_model_folder(path):
        loaded = open_model(path)
        probes = probe_tokens(loaded, LIMITS.probe_sequences)
        yield _compare(path.name, Pair.build(loaded.config, loaded.weights), None, probes)
        return
    found = list(checkpoint.complete_in(path))
    if not found:
        raise InputError(f"no checkpoint at {path}: name a run, a checkpoint, or nothing for small fresh models")
    before: Pair | None = None
    for folder in found:
        is_birth, is_last = folder.name == "step-0", folder == checkpoint.latest(folder.parent)
        if not (is_birth or is_last):
            continue
        loaded = checkpoint.load(folder)
        pair = Pair.build(loaded.config, loaded.weights)
        subject = f"{checkpoint.PHASE_FOLDERS[loaded.state.phase]} {folder.name}"
        yield _compare(subject, pair, before if is_birth else None)
        before = pair


def small_model(architecture: str, **fields: object) -> ModelConfig:
    """An architecture preset at a size that any machine runs in milliseconds; dropout off."""
    heads = {"n_heads": 6, "n_kv_heads": 2} if architecture == "smollm" else {"n_heads": 4}
    size = {"vocab_size": 256, "context_length": 32, "d_model": 48, "n_layers": 2, "d_ff": 96, "dropout": 0.0}
    return load_architecture(architecture, **(size | heads | fields))


def larger_model(config: ModelConfig) -> ModelConfig:
    """Half as wide again and a block deeper; twice as wide where only that is exact."""
    if config.norm_position == "post":
        return grow_config(config, d_model=2 * config.d_model, n_layers=config.n_layers)
    return grow_config(config, d_model=config.d_model * 3 // 2, n_layers=config.n_layers + 1)


def rough_weights(config: ModelConfig, seed: int) -> Arrays:
    """Initial weights with noise on every one, so that no norm is trivial and no bias 0."""
    return {
        name: array + np.float32(0.05) * normal(f"{name} roughness", seed, array.shape)
        for name, array in initialize(config, seed).items()
    }


def _compare(subject: str, pair: Pair, before: Pair | None, probes: Tokens | None = None) -> Comparison:
    if probes is None:
        probes = random_probes(pair.mlx.config, LIMITS.probe_sequences)
    return Comparison(
        subject=subject,
        architecture=pair.mlx.config.display_name,
        backends=certify(LIMITS, pair.mlx, pair.torch, probes),
        boundary_mlx=certify(LIMITS, before.mlx, pair.mlx, probes) if before else None,
        boundary_torch=certify(LIMITS, before.torch, pair.torch, probes) if before else None,
    )
