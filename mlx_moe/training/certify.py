"""Certification on probe tokens that a transfer left the model's function unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from mlx_moe.config import ModelConfig, VerificationConfig
from mlx_moe.errors import Error
from mlx_moe.parameters import Weights
from mlx_moe.training.backend import Logits, StreamedModel, Tokens, Trainer
from mlx_moe.transfer.certificate import Certificate, Replay, max_difference, probe
from mlx_moe.transfer.growth import layer_sources
from mlx_moe.transfer.permutation import plan_permutation
from mlx_moe.transfer.plan import apply_lazily

PROBE_TOKENS = 256  # logits of all 8,192 tokens of a published model's context would take 1.6 GB


def certify(
    limits: VerificationConfig, before: Trainer, after: Trainer, probes_BT1: Tokens, widened: bool = False
) -> Certificate:
    """Certify a transfer between two trainers; `widened`: the rounding floor may raise the limit of the logits."""

    def each_logits(model: Trainer, tokens_BT: Tokens) -> Iterator[Logits]:
        return (model.logits(tokens_T[None])[0] for tokens_T in tokens_BT)

    replay = partial(replay_routing, before, after) if before.config.moe and after.config.moe else None

    def floor(tokens_BT: Tokens) -> float:
        return rounding_floor(before, before.apply_transfer(plan_permutation(before.config)), tokens_BT)

    models = partial(each_logits, before), partial(each_logits, after)
    return probe(
        *models, probes_BT1, limits.max_logit_difference, limits.max_loss_jump, replay, floor if widened else None
    )


def certify_streamed(
    limits: VerificationConfig,
    before: StreamedModel,
    permuted: StreamedModel,
    after: StreamedModel,
    probes_BT1: Tokens,
) -> Certificate:
    """Certify a transfer between streamed models; `permuted`: `before` with permuted units, to measure rounding."""
    replay = partial(replay_routing, before, after) if before.config.moe and after.config.moe else None
    models, floor = (before.each_logits, after.each_logits), partial(rounding_floor, before, permuted)
    return probe(*models, probes_BT1, limits.max_logit_difference, limits.max_loss_jump, replay, floor)


def rounding_floor(model: Trainer | StreamedModel, permuted: Trainer | StreamedModel, tokens_BT: Tokens) -> float:
    """Return the largest logit difference between a model and its permuted copy, with the same experts."""
    one = model.routed_logits(tokens_BT)
    other = permuted.routed_logits(tokens_BT, one.experts_LNK if model.config.moe else None)
    return max_difference(one.logits_BTV, other.logits_BTV)


def permute_units(config: ModelConfig, weights: Weights) -> Weights:
    """Return the weights with the units of the model permuted, lazily."""
    return apply_lazily(plan_permutation(config), weights)


def replay_routing(before: Trainer | StreamedModel, after: Trainer | StreamedModel, tokens_BT: Tokens) -> Replay:
    """Run `after`, which may have more layers, with the experts that `before` chose.

    New layers use the choices of the layer that they copy; their own routing does not matter yet, as they add nothing.
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


class ChangedModel(Error):
    """A transfer changed the model, and that was not allowed."""

    def __init__(self, certificate: Certificate):
        super().__init__(
            f"the transfer changed the model: its logits by {certificate.max_logit_difference:.1e} (limit "
            f"{certificate.limit_logit_difference:.1e}), its loss by {abs(certificate.loss_jump):.1e} (limit "
            f"{certificate.limit_loss_jump:.1e}); to take it as it is: allow_lossy=True"
        )
        self.certificate = certificate
