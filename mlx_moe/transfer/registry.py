"""Registry of transfers: what a phase may do to the model of the phase before it.

A new transfer is a config in `config.AnyPhaseConfig`, a function that builds its plan, and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_moe.config import GrowPhaseConfig, ModelConfig, PhaseConfig, UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.transfer.centroids import Routers
from mlx_moe.transfer.experts import experts_of
from mlx_moe.transfer.growth import grow_config, plan_growth, usual_size
from mlx_moe.transfer.plan import Plan
from mlx_moe.transfer.upcycling import plan_phase


@dataclass(frozen=True)
class Transfer:
    """A kind of transfer.

    `target` derives the model from the one before by the settings of a phase, and `plan` builds the plan to it. Both
    raise InputError where the transfer is not possible. `plan` also takes a seed and, if the phase asks for them,
    routers on centroids.
    """

    noun: str  # of what happens at the boundary
    participle: str  # of what became of the model
    adjective: str  # of the model afterwards, in titles; empty, or with a blank behind it
    target: Callable[[ModelConfig, Any], ModelConfig]
    plan: Callable[[ModelConfig, Any, int, Routers | None], Plan]
    applies_to: Callable[[ModelConfig], bool] = lambda config: True  # else the phase trains the model as it is
    gives_experts: bool = False  # to a dense model


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
    "upcycle": Transfer("upcycling", "upcycled", "", _upcycled, plan_phase, lambda config: config.moe is None, True),
    "grow": Transfer("growth", "grown", "larger ", _grown, _plan_growth),
}


def transfer_of(phase: PhaseConfig) -> Transfer | None:
    """Return the transfer that a phase begins with; None for a phase that trains the model as it is."""
    kind: str | None = getattr(phase, "transfer", None)
    return None if kind is None else TRANSFERS[kind]
