"""Registry of the transfers that a phase may begin with.

A new transfer is a config in `config.AnyPhaseConfig`, a function that builds its plan, and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_moe.config import GrowPhaseConfig, ModelConfig, PhaseConfig, UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.growth import grow_config, plan_growth, usual_size
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.transfer.plan import Plan
from mlx_moe.transfer.upcycling import plan_phase


@dataclass(frozen=True)
class Transfer:
    """A kind of transfer.

    `target` derives the new model's config from the old one and a phase's settings, and `plan` builds the plan to it.
    Both raise InputError if the transfer is impossible. `plan` also takes a seed and, if the phase uses them, centroids
    for the routers.
    """

    noun: str  # names the transfer itself
    participle: str  # describes the resulting model in a sentence
    adjective: str  # describes it in titles; empty, or ending in a space
    target: Callable[[ModelConfig, Any], ModelConfig]
    plan: Callable[[ModelConfig, Any, int, Routers | None], Plan]
    applies_to: Callable[[ModelConfig], bool] = lambda config: True  # if false, the phase trains the model unchanged
    gives_experts: bool = False  # turns a dense model into experts


def _upcycled(config: ModelConfig, phase: UpcyclePhaseConfig) -> ModelConfig:
    if config.moe is not None:
        raise InputError(f"the model has {config.moe.n_experts} experts already; upcycle a dense one")
    return config.model_copy(update={"moe": experts_of(config, phase)})


def _grown(config: ModelConfig, phase: GrowPhaseConfig) -> ModelConfig:
    d_model, n_layers = usual_size(config)
    return grow_config(
        config,
        d_model=phase.d_model or d_model,
        n_layers=phase.n_layers or n_layers,
        n_heads=phase.n_heads,
        d_ff=phase.d_ff,
    )


def _plan_growth(config: ModelConfig, phase: GrowPhaseConfig, seed: int, routers: Routers | None = None) -> Plan:
    return plan_growth(config, _grown(config, phase), phase.split, seed)


TRANSFERS = {
    "upcycle": Transfer(
        noun="upcycling",
        participle="upcycled",
        adjective="",
        target=_upcycled,
        plan=plan_phase,
        applies_to=lambda config: config.moe is None,
        gives_experts=True,
    ),
    "grow": Transfer(noun="growth", participle="grown", adjective="larger ", target=_grown, plan=_plan_growth),
}


def transfer_of(phase: PhaseConfig) -> Transfer | None:
    """Return the transfer that a phase begins with; None if it trains the model unchanged."""
    kind: str | None = getattr(phase, "transfer", None)
    return None if kind is None else TRANSFERS[kind]
