"""What transfers promise holds, and a promise that is broken is noticed."""

from dataclasses import replace

import numpy as np
import pytest
from support.small_models import FOUR_EXPERTS, boundary_tokens, larger_model, probe_model

from mlx_moe.config import UpcyclePhaseConfig
from mlx_moe.transfer.growth import plan_growth
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_upcycling
from parity.boundaries import execution_claim, forced_claim, growth_claims, random_experts, upcycling_claims
from parity.compare import BackendPair
from parity.numpy_model import NumpyModel

FORCED, SUMMED = "any experts compute the dense model", "the experts' first gradients sum to the dense model's"
REPEATED, PREDICTED = "the grown residual stream is the old one repeated", "first gradients are as the plan predicts"


@pytest.mark.parametrize("name", ["gpt2", "gpt2-post", "smollm"])
def test_every_claim_holds(name):
    config, weights = probe_model(name, 1)
    claims = upcycling_claims(plan_upcycling(config, FOUR_EXPERTS, seed=1), weights, boundary_tokens(config, 1), 1)
    config, weights = probe_model(name, 1, FOUR_EXPERTS)
    plan = plan_growth(config, larger_model(config), seed=1)
    claims += growth_claims(plan, weights, boundary_tokens(config, 1))
    assert [claim.name for claim in claims] == [FORCED, SUMMED, REPEATED, PREDICTED]
    assert max(claim.error for claim in claims) < 1e-13


@pytest.mark.parametrize("how", [{"every": 2}, {"granularity": 4}, {"shared": True}], ids=str)
@pytest.mark.parametrize("name", ["gpt2-post", "smollm"])
def test_every_claim_holds_for_every_way_to_upcycle(name, how):
    config, weights = probe_model(name, 1)
    moe = experts_of(config, UpcyclePhaseConfig(n_experts=4, **how))
    claims = upcycling_claims(plan_upcycling(config, moe, seed=1), weights, boundary_tokens(config, 1), 1)
    config, weights = probe_model(name, 1, moe)
    claims += growth_claims(plan_growth(config, larger_model(config), seed=1), weights, boundary_tokens(config, 1))
    assert [claim.name for claim in claims] == [FORCED, SUMMED, REPEATED, PREDICTED]
    assert max(claim.error for claim in claims) < 1e-13


def test_parts_of_copies_that_do_not_go_together_are_another_model():
    config, weights = probe_model("llama", 0)
    moe = experts_of(config, UpcyclePhaseConfig(n_experts=4, granularity=2))
    plan, tokens = plan_upcycling(config, moe), boundary_tokens(config, 0)[:, :-1]
    dense, upcycled = NumpyModel(config, weights)(tokens), NumpyModel(plan.target_config, apply_numpy(plan, weights))
    for parts, same in ((2, True), (1, False)):
        experts_LNK = random_experts(plan.target_config, tokens, np.random.default_rng(0), parts)
        largest = np.abs(upcycled(tokens, experts_LNK).logits_BTV - dense.logits_BTV).max()
        assert largest < 1e-12 if same else largest > 1e-3


def changed(plan, name, change):
    return replace(plan, tensors=tuple(change(t) if t.target == name else t for t in plan.tensors))


def scaled(tensor):
    """Its first map a little off."""
    first, *rest = tensor.maps
    scale = np.ones(len(first.index)) if first.scale is None else first.scale
    return replace(tensor, maps=(replace(first, scale=scale * (1 + 1e-6)), *rest))


def test_broken_claims_are_noticed():
    config, weights = probe_model("llama", 0)
    tokens = boundary_tokens(config, 0)
    plan = plan_upcycling(config, FOUR_EXPERTS)
    broken = changed(plan, "layers.0.mlp.experts.up_proj.weight", scaled)
    forced, summed = upcycling_claims(broken, weights, tokens, 0)
    assert not forced.passed
    assert not summed.passed
    config, weights = probe_model("llama", 0, FOUR_EXPERTS)
    plan = plan_growth(config, larger_model(config))
    broken = changed(plan, "layers.0.self_attn.o_proj.weight", scaled)
    repeated, _ = growth_claims(broken, weights, tokens)
    assert not repeated.passed
    assert repeated.where.startswith("layers.")
    assert f"largest in {repeated.where}" in str(repeated)


def test_the_backends_executions():
    config, weights = probe_model("nano", 0)
    plan = plan_upcycling(config, FOUR_EXPERTS)
    dense = BackendPair.build(config, weights)
    upcycled = dense.apply_transfer(plan)
    assert execution_claim(plan, weights, upcycled.mlx, upcycled.torch).passed
    one_bit = {name: array.copy() for name, array in weights.items()}
    one_bit["norm.weight"][0] = np.nextafter(one_bit["norm.weight"][0], np.float32(2))
    claim = execution_claim(plan, one_bit, upcycled.mlx, upcycled.torch)
    assert (claim.error, claim.where) == (2, "norm.weight")
    tokens = boundary_tokens(config, 0)
    assert forced_claim(dense.mlx, upcycled.mlx, tokens, 1e-5, 0, "MLX").passed
    other = BackendPair.build(config, probe_model("nano", 5)[1])
    assert not forced_claim(other.mlx, upcycled.mlx, tokens, 1e-5, 0, "MLX").passed
