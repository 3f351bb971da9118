"""Compare MLX and PyTorch on the same weights and tokens with the float64 reference, and each across boundaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig, OptimizerConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.convert.probes import random_probes
from mlx_moe.errors import InputError
from mlx_moe.hub.models import is_model_folder, open_model, with_finite_weights
from mlx_moe.parameters import Weights
from mlx_moe.presets import preset_names
from mlx_moe.storage import checkpoint
from mlx_moe.training.backend import Trainer, choose_backend
from mlx_moe.training.certify import certify
from mlx_moe.transfer.growth import plan_growth
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.transfer.plan import Plan, apply_numpy
from mlx_moe.transfer.upcycling import plan_upcycling
from parity.boundaries import execution_claim, forced_claim, growth_claims, upcycling_claims
from parity.decoding import judge_decoding
from parity.judgement import judge
from parity.reference_forward import ReferenceForward
from parity.report import ModelComparison, ModelVerdict
from parity.small_models import (
    FOUR_EXPERTS,
    SEQUENCES,
    SMALL_MODEL_PARAMETERS,
    TOKENS,
    boundary_tokens,
    larger_model,
    probe_model,
    reference_tokens,
)
from parity.step_parity import judge_step, step_tokens
from parity.tolerances import CHECKPOINT_SLACK

LIMITS = VerificationConfig(probe_sequences=4)  # of boundaries, in fp32
# Options of upcycling, each tested on one architecture; the others have EXPERTS.
UPCYCLED = {
    "hybrid": UpcyclePhaseConfig(n_experts=4, every=2),
    "nano": UpcyclePhaseConfig(n_experts=4, granularity=2),
    "smollm": UpcyclePhaseConfig(n_experts=4, shared=True),
}
REFERENCE_BYTES = 4 << 30  # largest memory for a reference


@dataclass(frozen=True)
class BackendPair:
    """Model in both backends, with the same weights."""

    mlx: Trainer
    torch: Trainer

    @staticmethod
    def build(config: ModelConfig, weights: Weights) -> BackendPair:
        """Return the model on the CPU, without dropout, where both backends compute in full float32.

        Raises InputError where a backend is not installed.
        """
        config = config.model_copy(update={"dropout": 0.0})  # each backend draws its own
        trainers = [
            choose_backend(name).trainer(config, weights, OptimizerConfig(), "cpu") for name in ("mlx", "torch")
        ]
        return BackendPair(*trainers)

    def apply_transfer(self, plan: Plan) -> BackendPair:
        """Return the model after a transfer that each backend applies by itself."""
        return BackendPair(self.mlx.apply_transfer(plan), self.torch.apply_transfer(plan))


def compare_architectures(names: Sequence[str], seed: int) -> Iterator[ModelComparison]:
    """Compare small models of the architecture presets (all if none is named): dense, with experts, and grown."""
    for name in names or preset_names("architectures"):
        config, weights = probe_model(name, seed)
        dense = BackendPair.build(config, weights)
        yield _compare(f"{name}, dense", dense, weights, seed)
        moe = experts_of(config, UPCYCLED[name]) if name in UPCYCLED else FOUR_EXPERTS
        plan = plan_upcycling(config, moe, seed=seed)
        upcycled, tokens_BT1 = dense.apply_transfer(plan), boundary_tokens(config, seed)
        claims = [
            *upcycling_claims(plan, weights, tokens_BT1, seed),
            *(
                forced_claim(*trainers, tokens_BT1, LIMITS.max_logit_difference, seed, backend)
                for backend, trainers in (("MLX", (dense.mlx, upcycled.mlx)), ("torch", (dense.torch, upcycled.torch)))
            ),
            execution_claim(plan, weights, upcycled.mlx, upcycled.torch),
        ]
        config, weights = probe_model(name, seed, moe)
        experts = BackendPair.build(
            config, weights
        )  # upcycled experts are equal, so mistaking one for another would not show
        yield replace(_compare(f"{name}, experts", experts, weights, seed, (dense, upcycled)), claims=tuple(claims))
        plan = plan_growth(config, larger_model(config), seed=seed)
        grown = experts.apply_transfer(plan)
        claims = [
            *growth_claims(plan, weights, tokens_BT1),
            execution_claim(plan, weights, grown.mlx, grown.torch),
        ]
        # A new block's router has gradients from the auxiliary terms alone: too few roundings to judge half precision.
        comparison = _compare(
            f"{name}, grown", grown, apply_numpy(plan, weights), seed, (experts, grown), in_half=False
        )
        yield replace(comparison, claims=tuple(claims))


def compare_model(config: ModelConfig, weights: Weights, seed: int = 0) -> ModelComparison:
    """Compare both backends on the weights of one model. Raises InputError where a backend is not installed."""
    return _compare(config.display_name, BackendPair.build(config, weights), weights, seed, slack=CHECKPOINT_SLACK)


def compare_checkpoints(path: Path, seed: int) -> Iterator[ModelComparison]:
    """Compare one checkpoint, or all phases of a run: the first checkpoint of each, with the boundary, and the last."""
    if (path / checkpoint.MANIFEST).is_file() or is_model_folder(path) or not path.is_dir():
        loaded = with_finite_weights(open_model(path))
        pair = BackendPair.build(loaded.config, loaded.weights)
        yield _compare(path.name, pair, loaded.weights, seed, slack=CHECKPOINT_SLACK)
        return
    found = list(checkpoint.complete_in(path))
    if not found:
        raise InputError(f"no checkpoint in {path}: name a run, a checkpoint, or nothing for small fresh models")
    before: BackendPair | None = None
    for phase in dict.fromkeys(folder.parent for folder in found):
        births = [folder for folder in found if folder == phase / "step-0"]
        for place in (*births, phase):  # a phase's folder means its latest checkpoint, which a run in progress replaces
            loaded = with_finite_weights(checkpoint.load(place))
            is_birth = loaded.state.step == 0
            if births and is_birth and place == phase:
                continue
            pair = BackendPair.build(loaded.config, loaded.weights)
            subject = f"{phase.parent.name} step-{loaded.state.step}"
            boundary = (before, pair) if before and is_birth else None
            yield _compare(subject, pair, loaded.weights, seed, boundary, CHECKPOINT_SLACK)
            before = pair


def _compare(
    subject: str,
    pair: BackendPair,
    weights: Weights,
    seed: int,
    boundary: tuple[BackendPair, BackendPair] | None = None,
    slack: float = 1.0,
    in_half: bool = True,
) -> ModelComparison:
    config = pair.mlx.config
    probes = random_probes(config, LIMITS.probe_sequences)
    verdict, backends, too_large = None, None, _too_large(config)
    if too_large:
        backends = certify(LIMITS, pair.mlx, pair.torch, probes)
    else:
        reference = ReferenceForward(config, weights, reference_tokens(config, seed))
        verdict = judge(reference, reference.measure(pair.mlx), reference.measure(pair.torch), slack)
        if count_parameters(config).total <= SMALL_MODEL_PARAMETERS:
            verdict = _with_more(verdict, reference, pair, weights, seed, slack, in_half)
    comparison = ModelComparison(
        subject, config.display_name, verdict, too_large, backends, weights_sha256=_sha256(weights)
    )
    if boundary is None:
        return comparison
    before, after = boundary
    return replace(
        comparison,
        boundary_mlx=certify(LIMITS, before.mlx, after.mlx, probes),
        boundary_torch=certify(LIMITS, before.torch, after.torch, probes),
    )


def _with_more(
    verdict: ModelVerdict,
    reference: ReferenceForward,
    pair: BackendPair,
    weights: Weights,
    seed: int,
    slack: float,
    in_half: bool,
) -> ModelVerdict:
    """Return the verdict with decoding, generation and a training step added."""
    decoded, faults = judge_decoding(reference, pair.mlx, pair.torch)
    steps = judge_step(reference.config, weights, step_tokens(reference, seed), slack, in_half)
    return replace(verdict, tensors=(*verdict.tensors, *decoded, *steps), generation_faults=tuple(faults))


def _sha256(weights: Weights) -> str:
    """Return the hash of all names and numbers, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).data)
    return digest.hexdigest()


def _too_large(config: ModelConfig) -> str:
    """Return why the reference would take too much memory; empty where it fits.

    It takes the weights in float64 and in float32. Every module takes its inputs and outputs in both, and once more in
    float32.
    """
    widest = max(config.d_ff, config.n_heads * config.head_dim, config.d_model)
    tokens = SEQUENCES * min(TOKENS, config.context_length)
    per_layer = 40 * tokens * (8 * config.d_model + 6 * widest)
    needed = 12 * count_parameters(config).total + config.n_layers * per_layer + 80 * tokens * config.vocab_size
    if needed <= REFERENCE_BYTES:
        return ""
    reason = f"a float64 reference would take {needed / 2**30:.0f} GiB (limit {REFERENCE_BYTES >> 30})"
    return f"{reason}, so MLX is compared with PyTorch"
