"""MLX against PyTorch on the same weights and tokens, both against the truth; and each across the boundaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig, OptimizerConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.errors import InputError
from mlx_moe.hub.models import is_model_folder, open_model, with_finite_weights
from mlx_moe.parameters import Weights
from mlx_moe.presets import preset_names
from mlx_moe.storage import checkpoint
from mlx_moe.training.backend import Trainer, choose_backend
from mlx_moe.training.boundary import certify, random_probes
from mlx_moe.transfer.certificate import Certificate
from mlx_moe.transfer.experts import experts_of
from mlx_moe.transfer.growth import plan_growth
from mlx_moe.transfer.plan import Plan, apply
from mlx_moe.transfer.upcycling import plan_upcycling
from parity.boundaries import Claim, execution_claim, forced_claim, growth_claims, upcycling_claims
from parity.decoding import judge_decoding
from parity.small_models import (
    EXPERTS,
    SEQUENCES,
    SMALL,
    TOKENS,
    boundary_tokens,
    larger_model,
    probe_model,
    truth_tokens,
)
from parity.steps import judge_step, step_tokens
from parity.truth import Truth
from parity.yardstick import CHECKPOINT_SLACK, Verdict, judge

LIMITS = VerificationConfig(probe_sequences=4)  # fp32; those of a boundary
# Ways to upcycle, each on one architecture; all others have EXPERTS.
UPCYCLED = {
    "hybrid": UpcyclePhaseConfig(n_experts=4, every=2),
    "nano": UpcyclePhaseConfig(n_experts=4, granularity=2),
    "smollm": UpcyclePhaseConfig(n_experts=4, shared=True),
}
TRUTH_BYTES = 4 << 30  # what it may take


@dataclass(frozen=True)
class Comparison:
    """One model: both backends against the truth, or, where that is too large, MLX against PyTorch; and each of them
    across the boundary that led to it.
    """

    subject: str
    architecture: str
    verdict: Verdict | None
    without_truth: str = ""  # why there is no verdict
    backends: Certificate | None = None
    boundary_mlx: Certificate | None = None
    boundary_torch: Certificate | None = None
    claims: tuple[Claim, ...] = ()  # of the transfer that led to it
    weights_sha256: str = ""

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
        truthful = self.verdict is None or self.verdict.passed
        proofs: list[Certificate | Claim] = [*self.certificates.values(), *self.claims]
        return truthful and all(proof.passed for proof in proofs)


@dataclass(frozen=True)
class Pair:
    """The same weights in both backends."""

    mlx: Trainer
    torch: Trainer

    @staticmethod
    def build(config: ModelConfig, weights: Weights) -> Pair:
        """Raises InputError where a backend is not installed. On CPU both compute in full float32."""
        trainers = [
            choose_backend(name).trainer(config, weights, OptimizerConfig(), "cpu") for name in ("mlx", "torch")
        ]
        return Pair(*trainers)

    def apply_transfer(self, plan: Plan) -> Pair:
        """The plan executed by each backend for itself."""
        return Pair(self.mlx.apply_transfer(plan), self.torch.apply_transfer(plan))


def compare_architectures(names: Sequence[str], seed: int) -> Iterator[Comparison]:
    """Small models of the architecture presets (all, if none is named): dense, upcycled, grown."""
    for name in names or preset_names("architectures"):
        config, weights = probe_model(name, seed)
        dense = Pair.build(config, weights)
        yield _compare(f"{name}, dense", dense, weights, seed)
        moe = experts_of(config, UPCYCLED[name]) if name in UPCYCLED else EXPERTS
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
        experts = Pair.build(config, weights)  # upcycled ones are all the same, and none could be mistaken
        yield replace(_compare(f"{name}, experts", experts, weights, seed, (dense, upcycled)), claims=tuple(claims))
        plan = plan_growth(config, larger_model(config), seed=seed)
        grown = experts.apply_transfer(plan)
        claims = [
            *growth_claims(plan, weights, tokens_BT1),
            execution_claim(plan, weights, grown.mlx, grown.torch),
        ]
        # Gradients of a new block's router come from the auxiliary terms alone: too few roundings for half precision.
        comparison = _compare(f"{name}, grown", grown, apply(plan, weights), seed, (experts, grown), in_half=False)
        yield replace(comparison, claims=tuple(claims))


def compare_checkpoints(path: Path, seed: int) -> Iterator[Comparison]:
    """One checkpoint; or all phases of a run, each one's birth with the boundary behind it, and its end."""
    if (path / checkpoint.MANIFEST).is_file() or is_model_folder(path) or not path.is_dir():
        loaded = with_finite_weights(open_model(path))
        pair = Pair.build(loaded.config, loaded.weights)
        yield _compare(path.name, pair, loaded.weights, seed, slack=CHECKPOINT_SLACK)
        return
    found = list(checkpoint.complete_in(path))
    if not found:
        raise InputError(f"no checkpoint in {path}: name a run, a checkpoint, or nothing for small fresh models")
    before: Pair | None = None
    for phase in dict.fromkeys(folder.parent for folder in found):
        births = [folder for folder in found if folder == phase / "step-0"]
        for place in (*births, phase):  # a phase stands for its latest, which a run that trains replaces
            loaded = with_finite_weights(checkpoint.load(place))
            is_birth = loaded.state.step == 0
            if births and is_birth and place == phase:
                continue
            pair = Pair.build(loaded.config, loaded.weights)
            subject = f"{checkpoint.PHASE_FOLDERS[loaded.state.phase]} step-{loaded.state.step}"
            boundary = (before, pair) if before and is_birth else None
            yield _compare(subject, pair, loaded.weights, seed, boundary, CHECKPOINT_SLACK)
            before = pair


def _compare(
    subject: str,
    pair: Pair,
    weights: Weights,
    seed: int,
    boundary: tuple[Pair, Pair] | None = None,
    slack: float = 1.0,
    in_half: bool = True,
) -> Comparison:
    config = pair.mlx.config
    probes = random_probes(config, LIMITS.probe_sequences)
    verdict, backends, too_large = None, None, _too_large(config)
    if too_large:
        backends = certify(LIMITS, pair.mlx, pair.torch, probes)
    else:
        truth = Truth(config, weights, truth_tokens(config, seed))
        verdict = judge(truth, truth.measure(pair.mlx), truth.measure(pair.torch), slack)
        if count_parameters(config).total <= SMALL:
            verdict = _with_more(verdict, truth, pair, weights, seed, slack, in_half)
    comparison = Comparison(subject, config.display_name, verdict, too_large, backends, weights_sha256=_sha256(weights))
    if boundary is None:
        return comparison
    before, after = boundary
    return replace(
        comparison,
        boundary_mlx=certify(LIMITS, before.mlx, after.mlx, probes),
        boundary_torch=certify(LIMITS, before.torch, after.torch, probes),
    )


def _with_more(
    verdict: Verdict, truth: Truth, pair: Pair, weights: Weights, seed: int, slack: float, in_half: bool
) -> Verdict:
    """With a cache, row by row, in generation; and a training step."""
    ways, wrong_words = judge_decoding(truth, pair.mlx, pair.torch)
    steps = judge_step(truth.config, weights, step_tokens(truth, seed), slack, in_half)
    return replace(verdict, tensors=(*verdict.tensors, *ways, *steps), wrong_words=tuple(wrong_words))


def _sha256(weights: Weights) -> str:
    """Of names and numbers, by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).data)
    return digest.hexdigest()


def _too_large(config: ModelConfig) -> str:
    """Why there can be no truth; empty where there can.

    It takes the weights in float64 and in float32, and for every module what goes in and comes out, in both and once
    more in float32.
    """
    widest = max(config.d_ff, config.n_heads * config.head_dim, config.d_model)
    tokens = SEQUENCES * min(TOKENS, config.context_length)
    per_layer = 40 * tokens * (8 * config.d_model + 6 * widest)
    needed = 12 * count_parameters(config).total + config.n_layers * per_layer + 80 * tokens * config.vocab_size
    if needed <= TRUTH_BYTES:
        return ""
    return f"the truth would take {needed / 2**30:.0f} GiB, more than {TRUTH_BYTES >> 30}: MLX against PyTorch instead"
