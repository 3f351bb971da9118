"""Upcycling and growth of a model on disk: stream it through a plan, certify the result, then publish it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig, UpcyclePhaseConfig, VerificationConfig
from mlx_moe.convert.probes import checkpoint_probes, text_tokens
from mlx_moe.errors import InputError
from mlx_moe.hub.models import open_model, with_finite_weights
from mlx_moe.hub.sizes import check_room
from mlx_moe.limits import MAX_PHASES
from mlx_moe.parameters import Weights
from mlx_moe.phases import became, lineage_so_far
from mlx_moe.storage import checkpoint
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import Checkpoint, TrainerState
from mlx_moe.training.backend import Backend, Tokens
from mlx_moe.training.centroids import centroid_routers, centroid_tokens
from mlx_moe.training.certify import ChangedModel, certify_streamed, permute_units
from mlx_moe.training.console import Console
from mlx_moe.transfer.certificate import Certificate
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.transfer.plan import Plan, apply_streaming
from mlx_moe.transfer.registry import TRANSFERS
from mlx_moe.transfer.upcycling import LOSSY_METHOD, plan_phase


@dataclass(frozen=True)
class Request:
    """Source, destination and settings of a transfer command."""

    path: Path
    out: Path
    backend: Backend
    device: str
    allow_lossy: bool


def upcycle_model(request: Request, phase: UpcyclePhaseConfig, seed: int, text: str | None) -> bool:
    """Upcycle by `transfer_model` as a phase describes; centroids for the routers come from a text."""
    if (phase.router_init == "centroids") != (text is not None):
        raise InputError("--router centroids and --text FILE go together: clusters are of the model's states on a text")

    def target(config: ModelConfig) -> ModelConfig:
        return config.model_copy(update={"moe": experts_of(config, phase)})

    def plan(source: Checkpoint, _: ModelConfig) -> Plan:
        routers = None
        if text is not None:
            tokens_BT = text_tokens(source, text, centroid_tokens(phase))
            model = request.backend.streamed(source.config, source.weights, request.device)
            routers = centroid_routers(model, phase, tokens_BT, seed)
        return plan_phase(source.config, phase, seed, routers)

    return transfer_model(request, target, plan)


def transfer_model(
    request: Request,
    target: Callable[[ModelConfig], ModelConfig],
    plan: Callable[[Checkpoint, ModelConfig], Plan],
) -> bool:
    """Apply a plan to a model, certify and write it; return whether it was written.

    A transfer that is lossy by design is always written.
    """
    console, limits, device = Console(), VerificationConfig(), request.device
    console.line(f"backend: {request.backend.reason}")
    try:
        with creating(request.out) as partial:
            source = with_finite_weights(open_model(request.path))
            config = target(source.config)
            check_room(request.out, config)
            made = plan(source, config)
            names = f"{source.config.display_name} -> {config.display_name}"
            allow_lossy = request.allow_lossy or made.is_lossy
            probes_BT1 = checkpoint_probes(source, limits.probe_sequences)
            transfer = transfer_checkpoint(
                source, made, partial, request.backend, device, limits, allow_lossy, probes_BT1
            )
    except ChangedModel as changed:
        console.boundary(names, changed.certificate)
        return False
    console.boundary(names, transfer.certificate)
    console.parameters(count_parameters(config), config.display_name)
    console.line(
        f"wrote {request.out}: {transfer.bytes_written / 1e9:.2f} GB in "
        f"{transfer.seconds - transfer.seconds_certified:.1f} s, certified in {transfer.seconds_certified:.1f} s"
    )
    if made.is_lossy:
        console.line(LOSSY_METHOD)
    return True


@dataclass(frozen=True)
class TransferResult:
    certificate: Certificate
    bytes_written: int
    seconds: float
    seconds_certified: float  # included in `seconds`


def transfer_checkpoint(
    source: Checkpoint,
    plan: Plan,
    folder: Path,
    backend: Backend,
    device: str,
    limits: VerificationConfig,
    allow_lossy: bool,
    probes_BT1: Tokens,
) -> TransferResult:
    """Apply a plan to a checkpoint tensor by tensor, and certify on the probes that the written model is lossless.

    Fills a folder that is not visible yet, with weights only: training does not continue from a checkpoint outside a
    run. Raises ChangedModel if the certificate fails and `allow_lossy` is not set.
    """
    began = time.perf_counter()
    found: list[tuple[Certificate, float]] = []

    def check(written: Weights) -> None:
        began = time.perf_counter()
        models = (
            backend.streamed(source.config, source.weights, device),
            backend.streamed(source.config, permute_units(source.config, source.weights), device),
            backend.streamed(plan.target_config, written, device),
        )
        certificate = certify_streamed(limits, *models, probes_BT1)
        found.append((certificate, time.perf_counter() - began))
        if not certificate.passed and not allow_lossy:
            raise ChangedModel(certificate)

    lineage = (*lineage_so_far(source.state), became(TRANSFERS[plan.kind], plan.target_config))
    number = min(source.state.phase + 1, MAX_PHASES)
    state = TrainerState(number, 0, backend.name, lineage=lineage, transfer=plan.kind)
    blocks = apply_streaming(plan, source.weights)
    checkpoint.fill(folder, plan.target_config, state, blocks, source.tokenizer_folder, check)
    ((certificate, seconds_certified),) = found
    n_bytes = 4 * sum(math.prod(tensor.shape) for tensor in plan.tensors)
    return TransferResult(certificate, n_bytes, time.perf_counter() - began, seconds_certified)
