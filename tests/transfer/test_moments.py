"""What a transfer does to gradients: the moments' plans against finite differences, in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import architectures, growths, logits, small, tokens, upcyclings, weights

from mlx_moe.config import MoEConfig, UpcyclePhaseConfig
from mlx_moe.presets import load_architecture, preset_names
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import AxisMap, Pad, TensorPlan, apply_numpy, carry_moments
from mlx_moe.transfer.upcycling import plan_phase, plan_upcycling
from parity.gradients import loss_and_gradients
from parity.numpy_model import NumpyModel

EVERY_MODEL = [(name, moe) for name in preset_names("architectures") for moe in (None, MoEConfig(n_experts=3, top_k=2))]
RMSNORM = [(name, moe) for name, moe in EVERY_MODEL if load_architecture(name).normalization == "rmsnorm"]
# Read by one tensor only, whose coefficients are known.
ONE_READER = {"gate_proj", "up_proj", "v_proj", "router", "lm_head", "norm"}


@pytest.mark.parametrize(("architecture", "moe"), EVERY_MODEL)
def test_even_copies_share_every_gradient(architecture, moe):
    config = tiny(architecture, moe)
    target = grow_config(config, d_model=8, n_layers=layers(config), d_ff=8)
    checked = compare(plan_growth(config, target, "even"), weights(config))
    assert {projection(name) for name in checked} == {projection(name) for name in weights(config)}


@pytest.mark.parametrize(("architecture", "moe"), RMSNORM)
def test_pads_leave_the_gradients_of_rmsnorm_as_they_were(architecture, moe):
    config = tiny(architecture, moe)
    target = grow_config(config, d_model=11, n_layers=layers(config), d_ff=8)
    compare(plan_growth(config, target, "even"), weights(config))


@pytest.mark.parametrize("split", ["even", "uneven"])
def test_norms_of_heads_keep_their_gradients(split):
    config = tiny("llama", qk_norm=True, attention_bias="qkv", norm_eps=0.1)
    plan = plan_growth(config, grow_config(config, d_model=11, n_layers=3, n_heads=6), split)
    checked = compare(
        plan, weights(config), {"q_norm", "k_norm"} | ({"q_proj", "k_proj"} if split == "even" else set())
    )
    assert {"layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"} <= set(checked)


@pytest.mark.parametrize(("architecture", "moe"), EVERY_MODEL)
def test_uneven_copies_have_the_gradients_of_their_one_reader(architecture, moe):
    config = tiny(architecture, moe)
    width = 11 if config.norm_position == "pre" else 8
    target = grow_config(config, d_model=width, n_layers=layers(config), d_ff=12)
    one_reader = ONE_READER - ({"v_proj"} if config.n_kv_heads < config.n_heads else set())
    checked = compare(plan_growth(config, target, "uneven"), weights(config), one_reader)
    assert {projection(name) for name in checked} == one_reader & {projection(name) for name in weights(config)}


@pytest.mark.parametrize("architecture", preset_names("architectures"))
def test_the_gradients_of_experts_sum_to_that_of_the_dense_ffn(architecture):
    config = tiny(architecture)
    plan = plan_upcycling(config, MoEConfig(n_experts=3, top_k=2), router_std=1.0)
    arrays = weights(config)
    upcycled, generator = apply_numpy(plan, arrays), np.random.default_rng(0)
    for tensor in plan.tensors:
        if tensor.source is not None:
            place = tuple(generator.integers(arrays[tensor.source].shape))
            expected = slope(config, arrays, tensor.source, place)
            places = [(expert, *place) for expert in range(3)] if tensor.new_axis else [place]
            actual = [slope(plan.target_config, upcycled, tensor.target, place) for place in places]
            assert sum(actual) == pytest.approx(expected, rel=1e-6, abs=1e-8)
            if tensor.new_axis:
                (copies,) = tensor.maps
                np.testing.assert_allclose(copies.gradient, [[1 / 3] * 3, [1 / 6] * 3])


METHODS = [{}, {"every": 2}, {"granularity": 3}, {"shared": True}, {"granularity": 2, "shared": True}]


@pytest.mark.parametrize("how", METHODS, ids=str)
@pytest.mark.parametrize("architecture", ["simple", "smollm", "gpt2-post"])
def test_gradients_are_those_predicted_in_the_mean_over_copies(architecture, how):
    """Of every part, and of a shared expert; and squares as of gradients that are mostly noise."""
    config = tiny(architecture).model_copy(update={"d_ff": 6})
    quiet = {"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.0}
    phase = UpcyclePhaseConfig(n_experts=3, top_k=2, router_std=1.0, **how, **quiet)
    plan, arrays = plan_phase(config, phase, seed=0), weights(config)
    tokens_BT1 = np.random.default_rng(0).integers(0, config.vocab_size, (2, 7))
    _, before = loss_and_gradients(NumpyModel(config, arrays), tokens_BT1)
    _, after = loss_and_gradients(NumpyModel(plan.target_config, apply_numpy(plan, arrays)), tokens_BT1)
    predicted, squares = (
        apply_numpy(plan.moments(1), before),
        apply_numpy(plan.moments(2), {n: g**2 for n, g in before.items()}),
    )
    for tensor in plan.tensors:
        if tensor.source is None:
            continue
        found, expected = after[tensor.target], predicted[tensor.target]
        ratio = 1.0
        if tensor.new_axis:
            found, expected = (array.reshape(3, phase.granularity, *array.shape[1:]) for array in (found, expected))
            found, expected, ratio = found.mean(axis=0), expected.mean(axis=0), 3 / 2
        if tensor.target.endswith("experts.down_proj.bias"):  # every part has it, and the same gradient
            np.testing.assert_allclose(found, found[:1] + 0 * found, atol=1e-14)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14, err_msg=tensor.target)
        np.testing.assert_allclose(squares[tensor.target], ratio * predicted[tensor.target] ** 2, rtol=1e-12)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.data())
def test_a_carried_step_changes_the_loss_as_much(data):
    """⟨ΔW', m'⟩ = ⟨ΔW, m⟩: by the chain rule, what a source coordinate's images get of its gradient sums to 1."""
    config = data.draw(architectures())
    plan = plan_phase(config, data.draw(upcyclings(config)), seed=0)
    if data.draw(st.booleans()):
        config = plan.target_config if data.draw(st.booleans()) else config
        plan = plan_growth(config, data.draw(growths(config)), data.draw(st.sampled_from(["uneven", "even"])))
    steps, means = weights(config, seed=1), weights(config, seed=2)
    after_steps, after_means = apply_numpy(plan, steps), apply_numpy(plan.moments(1), means)
    new = {tensor.target for tensor in plan.tensors if tensor.source is None}
    inner = sum((after_steps[name] * after_means[name]).sum() for name in after_steps.keys() - new)
    assert inner == pytest.approx(sum((steps[name] * means[name]).sum() for name in steps), rel=1e-9)


@pytest.mark.parametrize("split", ["uneven", "even"])
def test_second_moments_go_by_the_square(split):
    config = small(moe=MoEConfig(n_experts=2, top_k=1).model_dump())
    plan = plan_growth(config, grow_config(config, d_model=14, n_layers=3, d_ff=12), split)
    means = weights(config)
    squares = {name: mean**2 for name, mean in means.items()}
    after_means, after_squares = apply_numpy(plan.moments(1), means), apply_numpy(plan.moments(2), squares)
    for name, mean in after_means.items():
        np.testing.assert_allclose(after_squares[name], mean**2, rtol=1e-12)


def test_what_is_new_starts_without_moments():
    config = small(moe=MoEConfig(n_experts=2, top_k=1).model_dump())
    plan = plan_growth(config, grow_config(config, d_model=8, n_layers=3))
    moments = apply_numpy(plan.moments(1), weights(config))
    assert not any(moment.any() for name, moment in moments.items() if name.startswith("layers.1."))
    assert not moments["embed_tokens.weight"][:, 6:].any()
    assert not moments["layers.0.self_attn.q_proj.weight"][:, 6:].any()
    assert moments["layers.2.self_attn.q_proj.weight"][:, :6].all()
    routers = apply_numpy(plan_upcycling(small(), MoEConfig()).moments(2), weights(small()))
    assert not routers["layers.0.mlp.router.weight"].any()


def test_a_gradient_scale_takes_the_place_of_the_weights():
    maps = (AxisMap(0, np.array([0, 0, 1]), np.array([1, 2, 3.0]), (np.array([0.5, 0.25, 1]), np.array([2, 3, 4.0]))),)
    tensor = TensorPlan("out", (3,), source="in", pads=(Pad(0, 1, "constant", 7),), maps=maps)
    (first,), (second,) = tensor.moments(1).maps, tensor.moments(2).maps
    np.testing.assert_array_equal(first.scale, [0.5, 0.25, 1])
    np.testing.assert_array_equal(second.scale, [2, 3, 4])
    assert tensor.moments(1).pads[0].value == 0


def test_a_state_is_carried_as_far_as_the_optimizer_keeps_it():
    config = small()
    plan = plan_growth(config, grow_config(config, d_model=8, n_layers=3))
    state = {f"m.{name}": array for name, array in weights(config).items()} | {"step": np.float32(7)}
    state["v.norm.weight"] = np.ones(6)  # as with Muon: second moments of some only
    shapes = {f"m.{tensor.target}": tensor.shape for tensor in plan.tensors} | {"v.norm.weight": (8,)}
    carried = carry_moments(plan, state, shapes.keys())
    assert {name: array.shape for name, array in carried.items()} == shapes | {"step": ()}
    assert carried["step"] == 7
    assert carried["v.norm.weight"][:6].all()
    expected = apply_numpy(plan.moments(1), weights(config))
    np.testing.assert_array_equal(carried["m.embed_tokens.weight"], expected["embed_tokens.weight"])


def tiny(architecture, moe=None, **fields):
    heads = {"n_heads": 4, "n_kv_heads": 2} if architecture == "smollm" else {"n_heads": 2}
    sizes = {"vocab_size": 7, "context_length": 6, "d_model": 4, "n_layers": 1 if moe else 2, "d_ff": 5, "head_dim": 4}
    return load_architecture(architecture, **sizes, **heads, **fields, dropout=0.0, moe=moe and moe.model_dump())


def layers(config):
    return config.n_layers + (config.norm_position == "pre")


def projection(name):
    return name.split(".")[-2]


def slope(config, arrays, name, place):
    """The derivative of a loss by one coordinate: central differences of fourth order."""
    losses = []
    for step in (1e-4, -1e-4, 2e-4, -2e-4):
        moved = arrays | {name: arrays[name].copy()}
        moved[name][place] += step
        logits_TV = logits(config, moved, tokens(config))
        losses.append(np.log(np.exp(logits_TV).sum(-1)).sum() - logits_TV[:, 0].sum())
    near, far = losses[0] - losses[1], losses[2] - losses[3]
    return (8 * near - far) / 12e-4


def compare(plan, arrays, projections=None):
    """Gradients of the target, in a few places, against the source's through the plan; the names of what was compared.

    The source's gradient is known in two places of each tensor and NaN elsewhere, which the plan carries along.
    """
    grown, generator = apply_numpy(plan, arrays), np.random.default_rng(0)
    known = {name: np.full_like(array, np.nan) for name, array in arrays.items()}
    for name, gradient in known.items():
        if projections is None or projection(name) in projections:
            for place in [tuple(generator.integers(gradient.shape)) for _ in range(2)]:
                gradient[place] = slope(plan.source_config, arrays, name, place)
    checked = []
    for name, predicted in apply_numpy(plan.moments(1), known).items():
        places = np.argwhere(np.isfinite(predicted) & (predicted != 0))  # 0 is a pad, or new
        for place in map(tuple, generator.permutation(places)[:2]):
            actual = slope(plan.target_config, grown, name, place)
            assert actual == pytest.approx(predicted[place], rel=1e-6, abs=1e-8), (name, place)
            checked.append(name)
    return checked
