"""The MoEConfig of a model after a transfer."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_moe.config import ModelConfig, MoEConfig, UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_PARAMETERS


def experts_of(config: ModelConfig, phase: UpcyclePhaseConfig) -> MoEConfig:
    """Return the experts that a dense model is upcycled to.

    Layers follow Hugging Face's `decoder_sparse_step`: those for which `every` divides i + 1. Raises InputError if no
    layer would get any, or if `granularity` does not divide the neurons.
    """
    parts = phase.granularity
    if phase.every > config.n_layers:
        raise InputError(f"every {phase.every} leaves no layer of {config.n_layers} with experts; take at most that")
    if config.d_ff % parts:
        nearest = max(n for n in range(1, parts) if config.d_ff % n == 0)
        raise InputError(f"granularity {parts} does not divide d_ff {config.d_ff}; take {nearest}, or another divisor")
    layers = tuple(range(phase.every - 1, config.n_layers, phase.every))
    moe = MoEConfig(
        n_experts=parts * phase.n_experts,
        top_k=parts * phase.top_k,
        load_balance_coefficient=phase.load_balance_coefficient,
        z_loss_coefficient=phase.z_loss_coefficient,
        d_ff=config.d_ff // parts if parts > 1 else None,
        shared_d_ff=config.d_ff if phase.shared else 0,
        layers=layers if phase.every > 1 else None,
    )
    n_parameters = config.model_copy(update={"moe": moe}).n_matrix_elements
    if n_parameters > MAX_PARAMETERS:
        raise InputError(
            f"{moe.n_experts} experts in {len(layers)} layers make {n_parameters:,} parameters; must be at most "
            f"{MAX_PARAMETERS:,}; take fewer experts"
        )
    return moe


def segments_of(config: ModelConfig, moe: MoEConfig) -> int:
    """Return the number of experts that a dense FFN is cut into.

    Raises InputError if `moe` is no upcycling of the model.
    """
    width = moe.d_ff or config.d_ff
    parts = config.d_ff // width
    if config.d_ff % width or moe.n_experts % max(parts, 1) or moe.top_k % max(parts, 1):
        raise InputError(
            f"{moe.n_experts} experts of {width} neurons with top_k {moe.top_k} are no parts of FFNs of {config.d_ff}: "
            "the width must divide that, and the number of parts n_experts and top_k"
        )
    if moe.shared_d_ff not in (0, config.d_ff):
        raise InputError(f"a shared expert of {moe.shared_d_ff} neurons is no copy; take {config.d_ff}, or 0")
    return parts


def grown_experts(config: ModelConfig, d_ff: int, sources: Sequence[int]) -> MoEConfig | None:
    """Return the experts of a grown model: widened like `d_ff`, in the layers that copy one with experts."""
    moe = config.moe
    if moe is None:
        return None
    widths = {
        "d_ff": moe.d_ff and round(moe.d_ff * d_ff / config.d_ff),
        "shared_d_ff": round(moe.shared_d_ff * d_ff / config.d_ff),
    }
    layers = _grown_layers(config, sources)
    return moe.model_copy(update=widths | {"layers": None if moe.layers is None else layers})


def check_experts_kept(config: ModelConfig, target: ModelConfig, sources: Sequence[int]) -> None:
    """Raise InputError unless the target's experts are a growth of the model's."""
    if (config.moe is None) != (target.moe is None):
        raise InputError("growth keeps a dense model dense and experts experts; upcycle first, then grow")
    if config.moe is None or target.moe is None:
        return
    layers = _grown_layers(config, sources)
    kept = {
        "n_experts": (config.moe.n_experts, target.moe.n_experts),
        "top_k": (config.moe.top_k, target.moe.top_k),
        "the layers with experts": (layers, target.expert_layers),
        "a shared expert": (config.moe.shared_d_ff > 0, target.moe.shared_d_ff > 0),
    }
    for name, (before, after) in kept.items():
        if before != after:
            raise InputError(f"growth keeps {name}: cannot go from {before} to {after}; take {before}")
    for name, before, after in (
        ("moe.d_ff", config.expert_d_ff, target.expert_d_ff),
        ("moe.shared_d_ff", config.moe.shared_d_ff, target.moe.shared_d_ff),
    ):
        if after < before:
            raise InputError(f"growth cannot shrink {name} from {before} to {after}; take at least {before}")


def _grown_layers(config: ModelConfig, sources: Sequence[int]) -> tuple[int, ...]:
    with_experts = set(config.expert_layers)
    return tuple(layer for layer, source in enumerate(sources) if source in with_experts)
