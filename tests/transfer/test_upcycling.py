import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import architectures, logit_difference, small, upcyclings, weights
from support.small_models import rough_weights, small_model

from mlx_moe.config import MoEConfig, UpcyclePhaseConfig
from mlx_moe.convert.probes import random_probes
from mlx_moe.errors import InputError
from mlx_moe.parameters import parameter_table
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.moe_layout import experts_of
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_phase, plan_upcycling


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.data())
def test_upcycling_is_exact_under_any_router(data):
    config = data.draw(architectures())
    plan = plan_phase(config, data.draw(upcyclings(config)), seed=0)
    target = plan.target_config
    assert [(tensor.target, tensor.shape) for tensor in plan.tensors] == [
        (p.name, p.shape) for p in parameter_table(target)
    ]
    for dtype, limit in ((np.float64, 1e-9), (np.float32, 2e-5)):
        arrays = weights(config, dtype)
        upcycled = apply_numpy(plan, arrays)
        assert {name: array.shape for name, array in upcycled.items()} == {
            p.name: p.shape for p in parameter_table(target)
        }
        assert logit_difference(config, arrays, target, upcycled) < limit


def test_experts_are_copies_and_routers_random():
    config = small(d_model=128, ffn_type="swiglu")
    arrays = weights(config, np.float32)
    moe = MoEConfig(n_experts=8)
    upcycled = apply_numpy(plan_upcycling(config, moe), arrays)
    for tensor in ("up_proj.weight", "gate_proj.bias", "down_proj.bias"):
        for expert in upcycled[f"layers.1.mlp.experts.{tensor}"]:
            np.testing.assert_array_equal(expert, arrays[f"layers.1.mlp.{tensor}"])
    routers = [upcycled[f"layers.{layer}.mlp.router.weight"] for layer in (0, 1)]
    assert np.std(routers[0]) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(*routers)
    other = apply_numpy(plan_upcycling(config, moe, seed=1), arrays)
    assert not np.array_equal(routers[0], other["layers.0.mlp.router.weight"])
    zero = apply_numpy(plan_upcycling(config, moe, "zero"), arrays)
    assert not zero["layers.0.mlp.router.weight"].any()


def test_parts_of_a_copy_lie_side_by_side_and_share_a_router_row():
    config = small(d_ff=6)
    arrays = weights(config, np.float32)
    phase = UpcyclePhaseConfig(n_experts=2, top_k=1, granularity=3, every=2)
    plan = plan_phase(config, phase, seed=0)
    assert plan.target_config.expert_layers == (1,)
    upcycled = apply_numpy(plan, arrays)
    dense, experts = "layers.1.mlp.", "layers.1.mlp.experts."
    for expert in range(6):
        part = slice(2 * (expert % 3), 2 * (expert % 3) + 2)
        for name in ("up_proj.weight", "up_proj.bias"):
            np.testing.assert_array_equal(upcycled[experts + name][expert], arrays[dense + name][part])
        down = arrays[dense + "down_proj.weight"][:, part]
        np.testing.assert_array_equal(upcycled[experts + "down_proj.weight"][expert], 3 * down)
        np.testing.assert_array_equal(upcycled[experts + "down_proj.bias"][expert], arrays[dense + "down_proj.bias"])
    rows = upcycled["layers.1.mlp.router.weight"]
    np.testing.assert_array_equal(rows, rows[[0, 0, 0, 3, 3, 3]])
    assert not np.array_equal(rows[0], rows[3])
    assert not any(".experts." in name for name in upcycled if name.startswith("layers.0."))


@pytest.mark.parametrize("router_init", ["random", "zero"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_backend_chooses_whole_copies(backend, router_init):
    """Rows that are equal must give logits that are, wherever they stand in a product."""
    config = small_model("llama")
    arrays = rough_weights(config, 0)
    for granularity, n_experts in ((2, 3), (4, 5), (8, 8)):
        phase = UpcyclePhaseConfig(n_experts=n_experts, granularity=granularity, router_init=router_init)
        dense = choose_backend(backend).trainer(config, arrays, device="cpu")
        upcycled = dense.apply_transfer(plan_phase(config, phase, seed=0))
        chosen_LNK = upcycled.routed_logits(random_probes(config, 4)).experts_LNK
        copies_LNKG = np.sort(chosen_LNK, axis=-1).reshape(*chosen_LNK.shape[:2], -1, granularity)
        np.testing.assert_array_equal(
            copies_LNKG, copies_LNKG[..., :1] // granularity * granularity + range(granularity)
        )


def test_what_a_phase_cannot_make_of_a_model_is_refused():
    config = small(d_ff=6)
    for how, message in (
        ({"every": 3}, "every 3 leaves no layer of 2 with experts"),
        ({"granularity": 4}, "granularity 4 does not divide d_ff 6; take 3"),
    ):
        with pytest.raises(InputError, match=message):
            experts_of(config, UpcyclePhaseConfig(**how))
    for fields, message in (
        ({"d_ff": 4}, "8 experts of 4 neurons with top_k 2 are no parts of FFNs of 6"),
        ({"d_ff": 2}, "are no parts"),  # top_k 2 is no multiple of 3
        ({"shared_d_ff": 5}, "a shared expert of 5 neurons is no copy; take 6"),
    ):
        with pytest.raises(InputError, match=message):
            plan_upcycling(config, MoEConfig(**fields))


def test_a_mixture_is_not_upcycled_again():
    with pytest.raises(InputError, match="4 experts already"):
        plan_upcycling(small(moe={"n_experts": 4}), MoEConfig())


@pytest.mark.parametrize("ffn_type", ["standard", "swiglu"])
def test_drop_draws_whole_neurons_anew(ffn_type):
    config = small(d_model=64, d_ff=120, ffn_type=ffn_type)
    arrays = weights(config, np.float32)
    upcycled = apply_numpy(plan_upcycling(config, MoEConfig(n_experts=4), drop=0.25), arrays)
    sets = set()
    for layer in range(2):
        dense, experts = f"layers.{layer}.mlp.", f"layers.{layer}.mlp.experts."
        names = [name.removeprefix(dense) for name in arrays if name.startswith(dense)]
        for name in names:
            for expert, after in enumerate(upcycled[experts + name]):
                before = arrays[dense + name]
                if name == "down_proj.bias":  # of no neuron
                    np.testing.assert_array_equal(before, after)
                    continue
                if name == "down_proj.weight":
                    before, after = before.T, after.T
                changed = before != after
                neurons = np.flatnonzero(changed if changed.ndim == 1 else changed.any(axis=1))
                sets.add((layer, expert, *neurons))
                assert len(neurons) == 30
                assert changed[neurons].all()
                old, new = before[neurons], after[neurons]
                if name.endswith("weight"):
                    assert new.std() == pytest.approx(old.std(), rel=0.1)
                    assert new.mean() == pytest.approx(old.mean(), abs=0.1 * float(old.std()))
                    assert abs(np.corrcoef(old.ravel(), new.ravel())[0, 1]) < 0.1
    assert len(sets) == 8  # the same neurons in all projections of an expert
    assert len({neurons[2:] for neurons in sets}) == 8  # others in each


def test_noise_is_relative_to_each_tensor():
    config = small(d_model=64, d_ff=120)
    arrays = weights(config, np.float32)
    plan = plan_upcycling(config, MoEConfig(n_experts=2), noise=0.1)
    upcycled = apply_numpy(plan, arrays)
    for name in ("up_proj.weight", "up_proj.bias", "down_proj.weight"):
        dense = arrays[f"layers.0.mlp.{name}"]
        first, second = upcycled[f"layers.0.mlp.experts.{name}"] - dense
        assert first.std() == pytest.approx(0.1 * dense.std(), rel=0.2)
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.2
    assert plan.is_lossy
    assert not plan_upcycling(config, MoEConfig(n_experts=2)).is_lossy


def test_neurons_that_are_drawn_anew_start_without_moments():
    config = small()
    arrays = weights(config)
    name = "layers.0.mlp.experts.up_proj.weight"
    kept, dropped = (
        plan_upcycling(config, MoEConfig(n_experts=2), **how).moments(1) for how in ({"noise": 0.1}, {"drop": 0.5})
    )
    np.testing.assert_array_equal(apply_numpy(kept, arrays)[name][0], arrays["layers.0.mlp.up_proj.weight"] / 2)
    assert not apply_numpy(dropped, arrays)[name].any()


LOSSY = [{"noise": 0.1}, {"drop": 0.5}, {"noise": 0.1, "drop": 0.5}]
PARTS = {"granularity": 2, "every": 2, "shared": True}


@pytest.mark.parametrize("how", [*LOSSY, LOSSY[2] | PARTS, PARTS], ids=str)
def test_both_backends_make_the_same(how):
    config = small(ffn_type="swiglu", d_ff=6)
    arrays = weights(config, np.float32)
    plan = plan_phase(config, UpcyclePhaseConfig(n_experts=3, **how), seed=0)
    expected = apply_numpy(plan, arrays)
    for backend in ("mlx", "torch"):
        trainer = choose_backend(backend).trainer(config, arrays, device="cpu")
        for name, array in trainer.apply_transfer(plan).weights().items():
            np.testing.assert_array_equal(array, expected[name])
