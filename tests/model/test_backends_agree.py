"""MLX against PyTorch: logits, loss, gradients, optimizer steps, optimizer state, and plans."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import mlx_gradients, torch_gradients
from support.small_models import (
    BACKENDS,
    FOUR_EXPERTS,
    LIMIT_LOGITS,
    build,
    every_model,
    larger_model,
    largest_difference,
    random_tokens,
    rough_weights,
    small_model,
)

from mlx_moe.config import COMPONENTS, ModelConfig, MoEConfig, OptimizerConfig
from mlx_moe.parameters import parameter_table
from mlx_moe.presets import preset_names
from mlx_moe.transfer.growth import plan_growth
from mlx_moe.transfer.plan import apply_numpy
from mlx_moe.transfer.upcycling import plan_upcycling
from parity.compare import BackendPair

# Adam divides a gradient by its own size, so one that is all rounding makes a whole step of noise: a larger eps damps
# it. Gradients are clipped and weights decay by much more than the limits below.
OPTIMIZER = OptimizerConfig(eps=1e-4, weight_decay=1.0, max_grad_norm=0.1)
LEARNING_RATE = 0.01
LIMIT_LOSS = 5e-6  # ten units in the last place of a loss near ln 256


@pytest.mark.parametrize("config", every_model())
def test_logits_and_loss(config):
    mlx, torch_ = (build(backend, config) for backend in BACKENDS)
    batch = random_tokens(config, n_columns=config.context_length + 1)
    assert largest_difference(mlx.logits(batch[:, :-1]), torch_.logits(batch[:, :-1])) < LIMIT_LOGITS
    assert mlx.loss(batch) == pytest.approx(torch_.loss(batch), abs=LIMIT_LOSS)
    if config.moe:
        assert np.array_equal(mlx.expert_load(batch[:, :-1]), torch_.expert_load(batch[:, :-1]))


@pytest.mark.parametrize("config", every_model())
def test_loss_is_the_cross_entropy_of_the_logits(config):
    batch = random_tokens(config, n_columns=config.context_length + 1)
    for backend in BACKENDS:
        trainer = build(backend, config)
        logits_BTV = trainer.logits(batch[:, :-1]).astype(np.float64)
        log_sum_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
        chosen_BT = np.take_along_axis(logits_BTV, batch[:, 1:, None], axis=-1)[..., 0]
        assert trainer.loss(batch) == pytest.approx((log_sum_BT - chosen_BT).mean(), abs=1e-5)


QWEN3 = {"qk_norm": True, "attention_bias": "qkv", "rope_scaling": {"factor": 8.0, "original_context_length": 16}}


@pytest.mark.parametrize("config", [*every_model(), pytest.param(small_model("llama", **QWEN3), id="head-norms")])
def test_gradients(config):
    weights, batch = rough_weights(config, seed=3), random_tokens(config, n_columns=config.context_length + 1)
    mlx_loss, mlx_of = mlx_gradients(config, weights, batch)
    torch_loss, torch_of = torch_gradients(config, weights, batch)
    assert mlx_loss == pytest.approx(torch_loss, abs=LIMIT_LOSS)
    assert set(mlx_of) == set(torch_of) == {parameter.name for parameter in parameter_table(config)}
    # Keys' biases have no gradient without rotation: softmax ignores what is the same for all keys.
    rounding = 1e-7 * np.sqrt(sum(np.square(array).sum() for array in torch_of.values()))
    for name, gradient in torch_of.items():
        if not (name.endswith("k_proj.bias") and config.position_encoding != "rope"):
            assert np.linalg.norm(gradient) > 10 * rounding, name
        assert np.linalg.norm(mlx_of[name] - gradient) < 1e-5 * np.linalg.norm(gradient) + rounding, name


@pytest.mark.parametrize("config", every_model())
def test_three_steps(config):
    trainers = [build(backend, config, optimizer=OPTIMIZER) for backend in BACKENDS]
    start = trainers[0].weights()
    for seed in range(3):
        batch = random_tokens(config, n_columns=config.context_length + 1, seed=seed)
        mlx, torch_ = (trainer.step(batch, LEARNING_RATE, dropout_seed=0)() for trainer in trainers)
        assert mlx.loss == pytest.approx(torch_.loss, abs=LIMIT_LOSS)
        assert mlx.cross_entropy == pytest.approx(torch_.cross_entropy, abs=LIMIT_LOSS)
        assert (mlx.loss > mlx.cross_entropy) == bool(config.moe)
        assert mlx.grad_norm == pytest.approx(torch_.grad_norm, rel=1e-5)
        assert torch_.grad_norm > OPTIMIZER.max_grad_norm
        if config.moe:
            assert np.array_equal(mlx.expert_load_LE, torch_.expert_load_LE)
    mlx, torch_ = (trainer.weights() for trainer in trainers)
    assert set(mlx) == set(torch_)
    for name in mlx:
        assert largest_difference(mlx[name], torch_[name]) < 1e-3 * LEARNING_RATE, name
    assert min(largest_difference(start[name], mlx[name]) for name in start if name.endswith("weight")) > 1e-3
    for one, other in zip(*(sorted(trainer.optimizer_state().items()) for trainer in trainers), strict=True):
        assert one[0] == other[0]
        assert largest_difference(one[1], other[1]) <= 1e-5 * np.abs(other[1]).max() + 1e-8, one[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_decays(backend):
    config = small_model("gpt2", moe=FOUR_EXPERTS)
    batch = random_tokens(config)
    after = []
    for weight_decay in (0.0, 1.0):
        trainer = build(backend, config, optimizer=OptimizerConfig(weight_decay=weight_decay))
        trainer.step(batch, LEARNING_RATE, dropout_seed=0)()
        after.append(trainer.weights())
    kept = {name for name in after[0] if np.array_equal(after[0][name], after[1][name])}
    assert kept == {name for name in after[0] if name.endswith(".bias") or "norm." in name}


@pytest.mark.parametrize(("source", "target"), [BACKENDS, BACKENDS[::-1]], ids=["mlx-to-torch", "torch-to-mlx"])
@pytest.mark.parametrize("config", every_model())
def test_optimizer_state_moves(config, source, target):
    batches = [random_tokens(config, n_columns=config.context_length + 1, seed=seed) for seed in range(6)]
    stays = build(source, config, optimizer=OPTIMIZER)
    for batch in batches[:3]:
        stays.step(batch, LEARNING_RATE, dropout_seed=0)()
    state = stays.optimizer_state()
    names = {f"{moment}.{parameter.name}" for parameter in parameter_table(config) for moment in "mv"}
    assert set(state) == names | {"step"}
    moved = build(target, config, stays.weights(), OPTIMIZER)
    forgetful = build(target, config, stays.weights(), OPTIMIZER)
    moved.load_optimizer_state(state)
    for batch in batches[3:]:
        losses = [trainer.step(batch, LEARNING_RATE, dropout_seed=0)().loss for trainer in (stays, moved, forgetful)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3
    assert stays.optimizer_state()["step"] == moved.optimizer_state()["step"] == 6


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("source", BACKENDS)
def test_optimizer_state_before_the_first_step_is_a_fresh_start(source, target):
    config = small_model("gpt2")
    state = build(source, config).optimizer_state()
    shapes = {parameter.name: parameter.shape for parameter in parameter_table(config)}
    expected = {f"{moment}.{name}": shape for name, shape in shapes.items() for moment in "mv"} | {"step": ()}
    assert {name: array.shape for name, array in state.items()} == expected
    assert not any(array.any() for array in state.values())
    loaded, fresh = build(target, config), build(target, config)
    loaded.load_optimizer_state(state)
    for trainer in (loaded, fresh):
        trainer.step(random_tokens(config), LEARNING_RATE, dropout_seed=0)()
    assert all(np.array_equal(loaded.weights()[name], array) for name, array in fresh.weights().items())


@pytest.mark.parametrize("name", preset_names("architectures"))
def test_plans_are_the_same_to_the_bit(name):
    config = small_model(name)
    pair = BackendPair.build(config, rough_weights(config, seed=4))
    plan = plan_upcycling(config, FOUR_EXPERTS, seed=4)
    check_plan(pair, plan)
    check_plan(pair, plan_growth(config, larger_model(config), seed=4))
    upcycled = pair.apply_transfer(plan)
    for split in ("uneven", "even"):
        check_plan(upcycled, plan_growth(plan.target_config, larger_model(plan.target_config), split, seed=4))


def check_plan(pair, plan):
    expected = apply_numpy(plan, pair.torch.weights())
    moved = pair.apply_transfer(plan)
    for trainer in (moved.mlx, moved.torch):
        assert trainer.config == plan.target_config
        weights = trainer.weights()
        assert set(weights) == set(expected)
        for name, array in expected.items():
            assert weights[name].dtype == array.dtype == np.float32
            assert weights[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transferred_trainer_is_one_of_its_own(backend):
    config = small_model("gpt2")
    before = build(backend, config)
    weights = before.weights()
    after = before.apply_transfer(plan_upcycling(config, FOUR_EXPERTS))
    after.step(random_tokens(config), LEARNING_RATE, dropout_seed=0)()
    assert all(np.array_equal(weights[name], array) for name, array in before.weights().items())
    assert not np.array_equal(weights["embed_tokens.weight"], after.weights()["embed_tokens.weight"])


@st.composite
def configs(draw):
    n_kv_heads = draw(st.integers(1, 2))
    n_experts = draw(st.integers(1, 5))
    moe = MoEConfig(n_experts=n_experts, top_k=draw(st.integers(1, n_experts)))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 40)),
        context_length=24,
        d_model=draw(st.integers(2, 24)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 5)),
        d_ff=draw(st.integers(1, 24)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        attention_bias=draw(st.sampled_from(["none", "qkv", "qkvo"])),
        qk_norm=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        bias=draw(st.booleans()),
        weight_tying=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        moe=draw(st.sampled_from([None, moe])),
        **{kind: draw(st.sampled_from(names)) for kind, names in COMPONENTS.items()},
    )


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(configs(), st.integers(0, 99), st.integers(1, 3), st.integers(1, 24))
def test_logits_of_any_architecture(config, seed, n_rows, n_columns):
    weights, tokens = rough_weights(config, seed), random_tokens(config, n_rows, n_columns, seed)
    mx.disable_compile()  # on CPU each new combination of components would wait for a C++ compiler
    try:
        mlx, torch_ = (build(backend, config, weights).logits(tokens) for backend in BACKENDS)
    finally:
        mx.enable_compile()
    assert largest_difference(mlx, torch_) < LIMIT_LOGITS
