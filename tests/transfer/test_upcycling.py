import numpy as np
import pytest
from architectures import architectures, experts, logit_difference, small, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_moe.config import MoEConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import table
from mlx_moe.transfer.plan import apply
from mlx_moe.transfer.upcycling import plan_upcycling


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(architectures(), experts(), st.sampled_from(["random", "zero"]))
def test_upcycling_is_exact_under_any_router(config, moe, router_init):
    plan = plan_upcycling(config, moe, router_init, router_std=1.0)
    target = plan.target_config
    assert [(tensor.target, tensor.shape) for tensor in plan.tensors] == [(p.name, p.shape) for p in table(target)]
    for dtype, limit in ((np.float64, 1e-9), (np.float32, 2e-5)):
        arrays = weights(config, dtype)
        upcycled = apply(plan, arrays)
        assert {name: array.shape for name, array in upcycled.items()} == {p.name: p.shape for p in table(target)}
        assert logit_difference(config, arrays, target, upcycled) < limit


def test_experts_are_copies_and_routers_random():
    config = small(d_model=128, ffn_type="swiglu")
    arrays = weights(config, np.float32)
    moe = MoEConfig(n_experts=8)
    upcycled = apply(plan_upcycling(config, moe), arrays)
    for tensor in ("up_proj.weight", "gate_proj.bias", "down_proj.bias"):
        for expert in upcycled[f"layers.1.mlp.experts.{tensor}"]:
            np.testing.assert_array_equal(expert, arrays[f"layers.1.mlp.{tensor}"])
    routers = [upcycled[f"layers.{layer}.mlp.router.weight"] for layer in (0, 1)]
    assert np.std(routers[0]) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(*routers)
    other = apply(plan_upcycling(config, moe, seed=1), arrays)
    assert not np.array_equal(routers[0], other["layers.0.mlp.router.weight"])
    zero = apply(plan_upcycling(config, moe, "zero"), arrays)
    assert not zero["layers.0.mlp.router.weight"].any()


def test_a_mixture_is_not_upcycled_again():
    with pytest.raises(InputError, match="4 experts already"):
        plan_upcycling(small(moe={"n_experts": 4}), MoEConfig())
