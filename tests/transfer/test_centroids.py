"""Routers on clusters of the model's own states: they find the clusters, spread the load, and change nothing."""

import numpy as np
import pytest
from support.architectures import logit_difference, small, weights
from support.small_models import rough_weights, small_model

from mlx_moe.config import UpcyclePhaseConfig
from mlx_moe.errors import InputError
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.centroids import centroid_routers
from mlx_moe.transfer.centroids import centroid_rows
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_phase
from parity.numpy_model import NumpyModel


def clusters(n_clusters, n_each=50, width=16, mean=5.0):
    """States around directions of their own, with a mean that is longer than all of these."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:n_clusters]
    states = directions[:, None] + 0.1 * rng.normal(size=(n_clusters, n_each, width))
    return (states + mean * rng.normal(size=width)).reshape(-1, width).astype(np.float32)


def test_each_cluster_gets_an_expert():
    x_ND = clusters(5)
    rows_ED = centroid_rows(x_ND, 5, seed=0)
    logits_NE = x_ND @ rows_ED.T
    first = logits_NE.argmax(axis=1).reshape(5, -1)
    assert (first == first[:, :1]).all()
    assert sorted(first[:, 0]) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(logits_NE.mean(axis=0), 0, atol=1e-3)  # no expert is ahead
    assert logits_NE.std() == pytest.approx(1, rel=1e-3)


def test_rows_are_a_function_of_states_and_seed():
    x_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    one, again, other = (centroid_rows(x_ND, 4, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert centroid_rows(x_ND[:4].repeat(9, axis=0), 4, seed=0).shape == (4, 8)  # as many states as clusters


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("name", ["simple", "gpt2-post", "smollm"])
def test_a_model_run_from_its_layers_shows_what_its_ffns_read(name, backend):
    config = small_model(name)
    arrays = rough_weights(config, 0)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    calls = NumpyModel(config, arrays)(tokens_BT).calls
    found = list(choose_backend(backend).streamed(config, arrays, "cpu").ffn_inputs(tokens_BT, [0, 1]))
    for layer, x_ND in enumerate(found):
        expected = calls[f"layers.{layer}.mlp"].inputs[0].reshape(-1, config.d_model)
        np.testing.assert_allclose(x_ND, expected, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"every": 2, "granularity": 5, "shared": True}], ids=str)
def test_any_centroids_are_exact(how):
    config = small(d_model=8)
    arrays = weights(config, np.float32)
    phase = UpcyclePhaseConfig(n_experts=3, router_init="centroids", **how)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (8, 8)).astype(np.int32)
    routers = centroid_routers(choose_backend("torch").streamed(config, arrays, "cpu"), phase, tokens_BT, seed=0)
    plan = plan_phase(config, phase, 0, routers)
    upcycled = apply_numpy(plan, arrays)
    assert list(routers) == list(plan.target_config.expert_layers)
    for layer, rows_ED in routers.items():
        written = upcycled[f"layers.{layer}.mlp.router.weight"]
        np.testing.assert_array_equal(written, rows_ED.repeat(phase.granularity, axis=0))
    assert logit_difference(config, arrays, plan.target_config, upcycled) < 2e-5
    for backend in ("mlx", "torch"):
        trainer = choose_backend(backend).trainer(config, arrays, device="cpu")
        for name, array in trainer.apply_transfer(plan).weights().items():
            np.testing.assert_array_equal(array, upcycled[name])


def test_too_few_tokens_are_refused():
    config = small()
    model = choose_backend("torch").streamed(config, weights(config, np.float32), "cpu")
    with pytest.raises(InputError, match="40 tokens are too few for the centroids of 3 experts; give at least 48"):
        centroid_routers(model, UpcyclePhaseConfig(n_experts=3), np.zeros((5, 8), np.int32), seed=0)
