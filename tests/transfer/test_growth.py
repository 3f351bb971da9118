import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import (
    architectures,
    growths,
    logit_difference,
    logits,
    mixtures,
    small,
    tokens,
    upcyclings,
    weights,
)

from mlx_moe.config import MoEConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import Axis, parameter_table
from mlx_moe.presets import load_architecture
from mlx_moe.transfer.growth import grow_config, layer_sources, plan_growth
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_phase

few = settings(deadline=None, max_examples=300, derandomize=True, database=None)


@few
@given(st.data())
def test_growth_is_exact(data):
    config = data.draw(architectures())
    if data.draw(st.booleans()):
        config = config.model_copy(update={"moe": data.draw(mixtures(config))})
    target = data.draw(growths(config))
    seed = data.draw(st.integers(0, 99))
    plan = plan_growth(config, target, data.draw(st.sampled_from(["uneven", "even"])), seed)
    assert [(tensor.target, tensor.shape) for tensor in plan.tensors] == [
        (p.name, p.shape) for p in parameter_table(target)
    ]
    for dtype, limit in ((np.float64, 1e-9), (np.float32, 2e-5)):
        arrays = weights(config, dtype, seed)
        grown = apply_numpy(plan, arrays)
        assert {name: array.shape for name, array in grown.items()} == {
            p.name: p.shape for p in parameter_table(target)
        }
        assert {array.dtype for array in grown.values()} == {np.dtype(dtype)}
        assert logit_difference(config, arrays, target, grown, seed) < limit


@few
@given(st.data())
def test_growth_after_upcycling_is_exact_under_any_router(data):
    config = data.draw(architectures())
    upcycling = plan_phase(config, data.draw(upcyclings(config)), seed=0)
    target = data.draw(growths(upcycling.target_config))
    growth = plan_growth(upcycling.target_config, target)
    for dtype, limit in ((np.float64, 1e-9), (np.float32, 2e-5)):
        arrays = weights(config, dtype)
        assert logit_difference(config, arrays, target, apply_numpy(growth, apply_numpy(upcycling, arrays))) < limit


@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_ties_between_different_experts_stay_ties(normalization):
    config = small(normalization=normalization, moe=MoEConfig(n_experts=4, top_k=2).model_dump())
    target = grow_config(config, d_model=17, n_layers=3)
    arrays = weights(config, np.float32)
    for name, array in arrays.items():
        array *= "router" not in name
    assert logit_difference(config, arrays, target, apply_numpy(plan_growth(config, target), arrays)) < 1e-5


@pytest.mark.parametrize("normalization", ["layernorm", "layernorm_nobias", "rmsnorm"])
def test_an_epsilon_that_does_not_grow_is_seen(normalization):
    config = small(normalization=normalization, norm_eps=1e-2)
    target = grow_config(config, d_model=10, n_layers=2)
    arrays = weights(config)
    grown = apply_numpy(plan_growth(config, target), arrays)
    assert logit_difference(config, arrays, target, grown) < 1e-12
    unscaled = target.model_copy(update={"norm_eps": config.norm_eps})
    assert logit_difference(config, arrays, unscaled, grown) > 1e-4


def test_copies_are_uneven_or_even_and_sum_to_one():
    config = small(weight_tying=False, moe=MoEConfig(n_experts=2, top_k=1).model_dump())
    target = grow_config(config, d_model=20, n_layers=2, n_kv_heads=5, d_ff=13)
    readers = {p.name: axis for p in parameter_table(target) for axis in p.axes if axis.name.endswith("READ")}
    assert set(readers.values()) == {Axis.RESIDUAL_READ, Axis.Q_HEADS_READ, Axis.FFN_READ}
    for split in ("uneven", "even"):
        plan = plan_growth(config, target, split)
        for tensor in (tensor for tensor in plan.tensors if tensor.target in readers):
            (split_map,) = (axis_map for axis_map in tensor.maps if axis_map.scale is not None)
            index, scale = split_map.index, split_map.scale.astype(np.float32)
            np.testing.assert_allclose(np.bincount(index, weights=scale), 1, atol=1e-7)
            for unit in np.unique(index):
                distinct = len(np.unique(scale[index == unit].round(3)))
                assert distinct == (np.sum(index == unit) if split == "uneven" else 1)


def test_tensors_share_out_the_copies_differently():
    config = small(d_model=9)
    plan = plan_growth(config, grow_config(config, d_model=18, n_layers=2))
    scales = {tensor.target: tensor.maps[-1].scale for tensor in plan.tensors}
    assert not np.array_equal(scales["layers.0.self_attn.q_proj.weight"], scales["layers.0.self_attn.k_proj.weight"])


def gradient(config, arrays, name, places):
    """Of a random function of the logits, by central differences."""
    weight_TV = np.random.default_rng(1).normal(size=(len(tokens(config)), config.vocab_size))
    slopes = []
    for place in places:
        values = []
        for step in (1e-5, -1e-5):
            moved = arrays | {name: arrays[name].copy()}
            moved[name][place] += step
            values.append((weight_TV * logits(config, moved, tokens(config))).sum())
        slopes.append((values[0] - values[1]) / 2e-5)
    return np.array(slopes)


@pytest.mark.parametrize("split", ["even", "uneven"])
def test_only_even_copies_have_the_same_gradients(split):
    config = small(normalization="rmsnorm", weight_tying=False)
    target = grow_config(config, d_model=12, n_layers=2)
    grown = apply_numpy(plan_growth(config, target, split), weights(config))
    name = "layers.0.self_attn.o_proj.weight"
    first, second = (gradient(target, grown, name, [(row, column) for column in range(4)]) for row in (2, 8))
    assert np.allclose(first, second, atol=1e-6) == (split == "even")
    name = "embed_tokens.weight"
    first, second = (gradient(target, grown, name, [(token, row) for token in tokens(config)]) for row in (2, 8))
    ratio = first / second
    assert np.ptp(ratio) < 1e-4 if split == "even" else np.ptp(ratio) > 1e-2


def test_pads_are_read_and_live():
    config = small()
    target = grow_config(config, d_model=8, n_layers=2)
    grown = apply_numpy(plan_growth(config, target), weights(config))
    assert np.all(grown["layers.0.self_attn.q_proj.weight"][:, 6:] != 0)
    assert np.all(grown["norm.weight"][6:] != 0)
    embedding_VD = grown["embed_tokens.weight"]
    np.testing.assert_allclose(embedding_VD[:, 6:], embedding_VD[:, :6].mean(1, keepdims=True).repeat(2, 1))


def test_new_blocks_follow_what_they_copy_and_write_zeros():
    assert layer_sources(7, 11) == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6]
    config = small(moe=MoEConfig(n_experts=2, top_k=1).model_dump())
    arrays = weights(config)
    grown = apply_numpy(plan_growth(config, grow_config(config, d_model=6, n_layers=3)), arrays)
    assert layer_sources(2, 3) == [0, 0, 1]
    for name in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.experts.down_proj.weight"):
        assert np.all(grown[f"layers.1.{name}"] == 0)
        np.testing.assert_array_equal(grown[f"layers.2.{name}"], arrays[f"layers.1.{name}"])
    for name in ("self_attn.q_proj.weight", "mlp.router.weight", "mlp.experts.up_proj.bias", "input_layernorm.bias"):
        np.testing.assert_array_equal(grown[f"layers.1.{name}"], arrays[f"layers.0.{name}"])


def test_new_blocks_are_of_the_kind_that_they_copy():
    config = small(n_layers=3, moe=MoEConfig(layers=(1,), d_ff=2, shared_d_ff=3).model_dump())
    target = grow_config(config, d_model=12, n_layers=7)
    assert layer_sources(3, 7) == [0, 0, 0, 1, 1, 2, 2]
    assert target.expert_layers == (3, 4)
    assert (target.d_ff, target.moe.d_ff, target.moe.shared_d_ff) == (10, 4, 6)


@pytest.mark.parametrize("split", ["even", "uneven"])
def test_only_even_growth_copies_units_within_new_blocks(split):
    config = small(normalization="layernorm", bias=True, moe=MoEConfig(n_experts=2, top_k=1).model_dump())
    target = grow_config(config, d_model=6, n_layers=3, n_heads=2 * config.n_heads, d_ff=2 * config.d_ff)
    grown = apply_numpy(plan_growth(config, target, split), weights(config))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.experts.up_proj"):
        new = grown[f"layers.1.{name}.weight"]
        original, second = np.split(new, 2, axis=-2)
        np.testing.assert_array_equal(original, np.split(grown[f"layers.0.{name}.weight"], 2, axis=-2)[0])
        same = np.all(original == second, axis=-1)
        assert same.all() if split == "even" else not same.any()
        bias = np.split(grown[f"layers.1.{name}.bias"], 2, axis=-1)[1]
        assert np.any(bias) == (split == "even")


def test_a_plan_is_a_function_of_its_seed():
    config = small()
    target = grow_config(config, d_model=14, n_layers=2)
    arrays = weights(config, np.float32)
    first, again, other = (apply_numpy(plan_growth(config, target, seed=seed), arrays) for seed in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    name = "layers.0.self_attn.q_proj.weight"
    assert np.all(np.any(first[name] != other[name], axis=0)[12:])


@pytest.mark.parametrize(
    ("architecture", "d_model", "n_layers", "grown"),
    [
        ("simple", 1352, 11, {"n_heads": 13, "n_kv_heads": 13, "d_ff": 5408, "head_dim": 104}),
        ("smollm", 864, 30, {"n_heads": 12, "n_kv_heads": 4, "d_ff": 2304, "head_dim": 64}),
        ("smollm", 1152, 30, {"n_heads": 18, "n_kv_heads": 6, "d_ff": 3072, "head_dim": 64}),
    ],
)
def test_what_is_left_out_grows_with_the_width(architecture, d_model, n_layers, grown):
    target = grow_config(load_architecture(architecture), d_model=d_model, n_layers=n_layers)
    assert {name: getattr(target, name) for name in grown} == grown


GQA = {"n_heads": 4, "n_kv_heads": 2}
POST = {"norm_position": "post"}


@pytest.mark.parametrize(
    ("source", "grown", "message"),
    [
        ({}, {"d_model": 5}, "cannot shrink d_model from 6 to 5; take at least 6"),
        ({}, {"n_layers": 1}, "cannot shrink n_layers"),
        ({}, {"d_ff": 4}, "cannot shrink d_ff"),
        (GQA, {"n_heads": 2}, "cannot shrink n_heads"),
        (GQA, {"n_heads": 5}, "n_heads 5 does not fill whole groups of 2 .* take n_heads 4"),
        (GQA, {"n_heads": 8, "n_kv_heads": 2}, "whole groups of 2 .* take n_heads 4"),
        (POST, {"n_layers": 3}, "post-norm blocks cannot be deepened exactly"),
        (POST, {"d_model": 10}, "take d_model 12"),
        (POST | {"normalization": "layernorm_nobias"}, {"d_model": 8}, "take d_model 6"),
    ],
)
def test_growth_that_is_not_exact_is_refused(source, grown, message):
    with pytest.raises(InputError, match=message):
        grow_config(small(**source), **({"d_model": 6, "n_layers": 2} | grown))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 6}, "growth keeps head_dim: cannot go from 4 to 6; take 4"),
        ({"ffn_type": "swiglu"}, "growth keeps ffn_type"),
        ({"vocab_size": 12}, "growth keeps vocab_size"),
        ({"weight_tying": False}, "growth keeps weight_tying"),
        ({"norm_eps": 1e-4}, "norm_eps 1e-05, not 0.0001"),
        ({"moe": MoEConfig()}, "upcycle first"),
        ({"d_model": 5}, "cannot shrink"),
    ],
)
def test_a_target_that_computes_something_else_is_refused(changed, message):
    config = small()
    with pytest.raises(InputError, match=message):
        plan_growth(config, config.model_copy(update=changed))


def test_the_number_of_experts_stays():
    config = small(moe=MoEConfig(n_experts=4, top_k=2).model_dump())
    other = config.model_copy(update={"moe": config.moe.model_copy(update={"layers": (0,)})})
    with pytest.raises(InputError, match=r"growth keeps the layers with experts: cannot go from \(0, 1\) to \(0,\)"):
        plan_growth(config, other)
    other = config.model_copy(update={"moe": config.moe.model_copy(update={"d_ff": 3})})
    with pytest.raises(InputError, match=r"cannot shrink moe\.d_ff from 5 to 3"):
        plan_growth(config, other)
    with pytest.raises(InputError, match="growth keeps top_k"):
        plan_growth(config, config.model_copy(update={"moe": MoEConfig(n_experts=4, top_k=1)}))
    trained_otherwise = config.model_copy(update={"moe": MoEConfig(n_experts=4, load_balance_coefficient=0.5)})
    plan_growth(config, trained_otherwise.model_copy(update={"dropout": 0.1}))
