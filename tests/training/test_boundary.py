"""Ties between experts: rounding may choose, and the certificate must neither fail nor be fooled by it."""

import numpy as np
import pytest
from support.small_models import rough_weights, small_model

from mlx_moe.config import MoEConfig, OptimizerConfig, VerificationConfig
from mlx_moe.convert.probes import random_probes
from mlx_moe.training.backend import Backend
from mlx_moe.training.certify import certify, replay_routing
from mlx_moe.transfer.growth import grow_config, plan_growth

CONFIG = small_model("llama", moe=MoEConfig(n_experts=4, top_k=1))
PROBES = random_probes(CONFIG, 4)


def trainer(backend, weights, config=CONFIG):
    return Backend(backend, "").trainer(config, weights, OptimizerConfig(), "cpu")


def tied_weights():
    """Experts 0 and 1 differ, and tie in the router of the first layer for every token, but for the last bit."""
    weights = rough_weights(CONFIG, 0)
    router = weights["layers.0.mlp.router.weight"]
    router *= 10
    up_or_down = np.random.default_rng(0).choice([-np.inf, np.inf], router[0].shape).astype(np.float32)
    router[1] = np.nextafter(router[0], up_or_down)
    return weights


def grown(model):
    target = grow_config(model.config, d_model=72, n_layers=3)
    return model.apply_transfer(plan_growth(model.config, target, seed=1))


def certificate(before, after):
    # The loss is each model's own, so with every token tied it may jump; here the logits are judged.
    return certify(VerificationConfig(max_loss_jump=1.0), before, after, PROBES)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_tie_that_rounding_decides_is_told_apart(backend):
    before = trainer(backend, tied_weights())
    found = certificate(before, grown(before))
    assert found.passed
    assert found.routing_flips > 0
    assert found.free_logit_difference > 1e-3
    assert found.max_logit_difference < 1e-5
    assert found.router_difference < 1e-5


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_real_change_fails_beside_ties(backend):
    before = trainer(backend, tied_weights())
    after = grown(before)
    weights = after.weights()
    weights["layers.0.mlp.experts.down_proj.weight"][2] *= 1.01
    assert not certificate(before, trainer(backend, weights, after.config)).passed


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_changed_router_fails_though_it_flips(backend):
    before = trainer(backend, tied_weights())
    weights = before.weights()
    weights["layers.0.mlp.router.weight"][3] += 0.05
    found = certificate(before, trainer(backend, weights))
    assert found.routing_flips > 0
    assert not found.passed


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_forced_experts_are_visited(backend):
    model = trainer(backend, rough_weights(CONFIG, 0))
    free = model.routed_logits(PROBES[:1, :-1])
    np.testing.assert_allclose(free.logits_BTV, model.logits(PROBES[:1, :-1]), atol=1e-6)
    assert free.experts_LNK.shape == (2, 32, 1)
    again = model.routed_logits(PROBES[:1, :-1], free.experts_LNK)
    np.testing.assert_array_equal(again.logits_BTV, free.logits_BTV)
    other = model.routed_logits(PROBES[:1, :-1], (free.experts_LNK + 1) % 4)
    assert np.abs(other.logits_BTV - free.logits_BTV).max() > 1e-3
    np.testing.assert_array_equal(other.experts_LNK, (free.experts_LNK + 1) % 4)


def test_the_backends_route_alike():
    models = [trainer(backend, rough_weights(CONFIG, 0)) for backend in ("mlx", "torch")]
    replay = replay_routing(*models, PROBES[:1, :-1])
    assert replay.flipped == 0
    assert replay.router_difference < 1e-5
