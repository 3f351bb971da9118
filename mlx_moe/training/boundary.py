"""The boundaries between phases: which plan, is it lossless, and the same for a checkpoint outside a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mlx_moe.config import ModelConfig, PhaseConfig, RunConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Weights
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.training.backend import Backend, Logits, StreamedModel, Tokens, Trainer
from mlx_moe.transfer.centroids import Routers, centroid_rows
from mlx_moe.transfer.certificate import Certificate, Replay, max_difference, probe
from mlx_moe.transfer.experts import experts_of
from mlx_moe.transfer.growth import grow_config, layer_sources, plan_growth, usual_size
from mlx_moe.transfer.plan import Plan, made, made_in_blocks
from mlx_moe.transfer.reordering import plan_reordering
from mlx_moe.transfer.upcycling import plan_phase

CENTROID_TOKENS = 4096
TOKENS_PER_CENTROID = 16  # at least
PROBE_TOKENS = 256  # the logits of all 8,192 tokens that a published model can see would take 1.6 GB


def phase_config(run: RunConfig, phase: int) -> PhaseConfig:
    return (run.phases.dense, run.phases.moe, run.phases.large_moe)[phase - 1]


def phase_model(run: RunConfig, phase: int) -> ModelConfig:
    """The architecture that a run trains in phase 1, 2 or 3.

    Raises InputError where growth to it is not exact, and where a model that starts with experts would be upcycled.
    """
    if phase == 1:
        return run.model
    if run.model.moe is not None and run.start is None:
        raise InputError(
            f"model.moe: the model starts with {run.model.moe.n_experts} experts, so there is nothing to upcycle; "
            "train it with --phases 1, or leave model.moe out"
        )
    experts = run.model.model_copy(update={"moe": run.model.moe or experts_of(run.model, run.phases.moe)})
    return experts if phase == 2 else _large(run, experts)


def trained_model(run: RunConfig, phase: int) -> ModelConfig:
    """`phase_model`, with the adapters that the run trains it by."""
    return phase_model(run, phase).model_copy(update={"lora": run.lora if run.lora.rank else None})


def lineage(run: RunConfig, phase: int) -> tuple[str, ...]:
    """What a model in a phase comes from; nothing where the run's weights were drawn anew."""
    if run.start is None:
        return ()
    done = [*run.start.lineage]
    for earlier in range(start_phase(run), phase):
        if earlier >= run.first_phase:
            done.append(f"trained for {phase_config(run, earlier).steps:,} steps")
        done.append(_became(earlier + 1, phase_model(run, earlier + 1)))
    return tuple(done)


def lineage_so_far(state: TrainerState) -> tuple[str, ...]:
    """With the training of a checkpoint's own phase."""
    return (*state.lineage, f"trained for {state.step:,} steps") if state.step else state.lineage


def start_phase(run: RunConfig) -> int:
    """The phase that trains models like the first one: 2 where a run starts from one with experts, else 1.

    A run may leave out to train in it, and transfer the model at once.
    """
    return 2 if run.start and run.model.moe else 1


def _became(phase: int, model: ModelConfig) -> str:
    return f"{'upcycled' if phase == 2 else 'grown'} to {model.display_name}"


def plan_boundary(run: RunConfig, phase: int, config: ModelConfig, routers: Routers | None = None) -> Plan:
    """The plan from the model of `phase` to that of the next; with the `routers` of `centroid_routers`, if any."""
    if phase == 1:
        return plan_phase(config, run.phases.moe, run.seed, routers)
    return plan_growth(config, _large(run, config), run.phases.large_moe.split, run.seed)


def centroid_tokens(phase: UpcyclePhaseConfig) -> int:
    """How many tokens to take centroids of."""
    return max(CENTROID_TOKENS, TOKENS_PER_CENTROID * phase.n_experts)


def centroid_routers(model: StreamedModel, phase: UpcyclePhaseConfig, tokens_BT: Tokens, seed: int) -> Routers:
    """A router for every layer that a phase gives experts, on clusters of what it would read in these tokens.

    Raises InputError where they are too few.
    """
    if tokens_BT.size < TOKENS_PER_CENTROID * phase.n_experts:
        raise InputError(
            f"{tokens_BT.size} tokens are too few for the centroids of {phase.n_experts} experts; give at least "
            f"{TOKENS_PER_CENTROID * phase.n_experts}"
        )
    upcycled = model.config.model_copy(update={"moe": experts_of(model.config, phase)})
    inputs = model.ffn_inputs(tokens_BT, upcycled.expert_layers)
    return {
        layer: centroid_rows(x_ND, phase.n_experts, seed)
        for layer, x_ND in zip(upcycled.expert_layers, inputs, strict=True)
    }


def certify(
    limits: VerificationConfig, before: Trainer, after: Trainer, probes_BT1: Tokens, widened: bool = False
) -> Certificate:
    """`widened`: what rounding does to the model before may widen the limit of the logits."""

    def each_logits(model: Trainer, tokens_BT: Tokens) -> Iterator[Logits]:
        return (model.logits(tokens_T[None])[0] for tokens_T in tokens_BT)

    replay = partial(replay_routing, before, after) if before.config.moe and after.config.moe else None

    def floor(tokens_BT: Tokens) -> float:
        return rounding_floor(before, before.apply_transfer(plan_reordering(before.config)), tokens_BT)

    models = partial(each_logits, before), partial(each_logits, after)
    return probe(
        *models, probes_BT1, limits.max_logit_difference, limits.max_loss_jump, replay, floor if widened else None
    )


def certify_streamed(
    limits: VerificationConfig,
    before: StreamedModel,
    reordered: StreamedModel,
    after: StreamedModel,
    probes_BT1: Tokens,
) -> Certificate:
    """`reordered` is `before` with its units in another order, to see what rounding does."""
    replay = partial(replay_routing, before, after) if before.config.moe and after.config.moe else None
    models, floor = (before.each_logits, after.each_logits), partial(rounding_floor, before, reordered)
    return probe(*models, probes_BT1, limits.max_logit_difference, limits.max_loss_jump, replay, floor)


def rounding_floor(model: Trainer | StreamedModel, reordered: Trainer | StreamedModel, tokens_BT: Tokens) -> float:
    """The largest difference of a logit between a model and itself in another order, with the same experts."""
    one = model.routed_logits(tokens_BT)
    other = reordered.routed_logits(tokens_BT, one.experts_LNK if model.config.moe else None)
    return max_difference(one.logits_BTV, other.logits_BTV)


def in_another_order(config: ModelConfig, weights: Weights) -> Weights:
    return made(plan_reordering(config), weights)


def replay_routing(before: Trainer | StreamedModel, after: Trainer | StreamedModel, tokens_BT: Tokens) -> Replay:
    """Run `after`, of as many layers or more, with the experts that `before` chose.

    New layers copy the choices of the layer that they copy; they add nothing yet, so their own routing is not compared.
    """
    sources = layer_sources(before.config.n_layers, after.config.n_layers)
    with_experts = before.config.expert_layers
    copied = [with_experts.index(sources[layer]) for layer in after.config.expert_layers]
    originals = [copied.index(place) for place in range(len(with_experts))]
    chosen = before.routed_logits(tokens_BT)
    replayed = after.routed_logits(tokens_BT, chosen.experts_LNK[copied])
    router_logits_LNE = replayed.router_logits_LNE[originals]
    top_k = chosen.experts_LNK.shape[-1]
    own_LNK = np.argsort(-router_logits_LNE, axis=-1, kind="stable")[..., :top_k]
    same_LN = (np.sort(own_LNK, axis=-1) == np.sort(chosen.experts_LNK, axis=-1)).all(axis=-1)
    return Replay(
        logits=replayed.logits_BTV,
        router_difference=float(np.abs(router_logits_LNE - chosen.router_logits_LNE).max()),
        flipped=int((~same_LN).sum()),
    )


@dataclass(frozen=True)
class Transfer:
    certificate: Certificate
    bytes_written: int
    seconds: float
    seconds_certified: float  # of those


class ChangedModel(Exception):
    """A transfer changed the model, and that was not allowed."""

    def __init__(self, certificate: Certificate):
        super().__init__("the transfer changed the model")
        self.certificate = certificate


def transfer_checkpoint(
    source: Checkpoint,
    plan: Plan,
    folder: Path,
    backend: Backend,
    device: str,
    limits: VerificationConfig,
    allow_lossy: bool,
    probes_BT1: Tokens,
) -> Transfer:
    """Apply a plan to a checkpoint, piece by piece, and prove on the probes that what was written is lossless.

    Fills a folder that is not seen yet. Of the weights only: nothing trains on from a checkpoint outside a run. Raises
    ChangedModel where the certificate fails and `allow_lossy` is not set.
    """
    began = time.perf_counter()
    found: list[tuple[Certificate, float]] = []

    def check(written: Weights) -> None:
        began = time.perf_counter()
        models = (
            backend.streamed(source.config, source.weights, device),
            backend.streamed(source.config, in_another_order(source.config, source.weights), device),
            backend.streamed(plan.target_config, written, device),
        )
        certificate = certify_streamed(limits, *models, probes_BT1)
        found.append((certificate, time.perf_counter() - began))
        if not certificate.passed and not allow_lossy:
            raise ChangedModel(certificate)

    phase = 2 if source.config.moe is None and plan.target_config.moe else 3
    done = _became(phase, plan.target_config)
    state = TrainerState(phase, 0, backend.name, lineage=(*lineage_so_far(source.state), done))
    blocks = made_in_blocks(plan, source.weights)
    checkpoint.fill(folder, plan.target_config, state, blocks, source.tokenizer_folder, check)
    ((certificate, seconds_certified),) = found
    n_bytes = 4 * sum(math.prod(tensor.shape) for tensor in plan.tensors)
    return Transfer(certificate, n_bytes, time.perf_counter() - began, seconds_certified)


def random_probes(config: ModelConfig, n: int, seed: int = 0) -> Tokens:
    """(n, T + 1) random tokens, for models whose data is not at hand; T is the context, at most PROBE_TOKENS."""
    shape = (n, min(config.context_length, PROBE_TOKENS) + 1)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def _large(run: RunConfig, config: ModelConfig) -> ModelConfig:
    phase = run.phases.large_moe
    d_model, n_layers = usual_size(config)
    return grow_config(
        config,
        d_model=phase.d_model or d_model,
        n_layers=phase.n_layers or n_layers,
        n_heads=phase.n_heads,
        d_ff=phase.d_ff,
    )
