"""How a step is computed leaves what it computes: in parts, with checkpointed or compiled blocks, in half precision."""

import numpy as np
import pytest
from support.small_models import BACKENDS, FOUR_EXPERTS, build, larger_model, random_tokens, rough_weights, small_model

from mlx_moe.config import EngineConfig, OptimizerConfig
from mlx_moe.device import CPU, CUDA, METAL
from mlx_moe.errors import InputError
from mlx_moe.model.optimizers import update_groups
from mlx_moe.parameters import shapes
from mlx_moe.precision import GROWTH_INTERVAL, LossScale, choose_precision
from mlx_moe.training.backend import choose_backend
from mlx_moe.transfer.growth import plan_growth

LEARNING_RATE = 1e-3
MODELS = {"dense": small_model("simple"), "experts": small_model("smollm", moe=FOUR_EXPERTS)}


def trained(backend, config, steps=4, engine=None, learning_rate=LEARNING_RATE, optimizer="adamw"):
    """The trainer and its metrics after some steps on batches of 4."""
    trainer = build(
        backend, config, optimizer=OptimizerConfig(name=optimizer, eps=1e-5), engine=engine or EngineConfig()
    )
    batches = (random_tokens(config, 4, config.context_length + 1, seed) for seed in range(steps))
    return trainer, [trainer.step(batch, learning_rate, dropout_seed=seed)() for seed, batch in enumerate(batches)]


def assert_same(one, other, limit):
    for left, right in zip(one[1], other[1], strict=True):
        assert left.loss == pytest.approx(right.loss, rel=limit)
        assert left.cross_entropy == pytest.approx(right.cross_entropy, rel=limit)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=10 * limit)
        if left.expert_load_LE is not None:
            assert np.abs(left.expert_load_LE - right.expert_load_LE).max() < limit
            assert np.abs(left.router_entropy_L - right.router_entropy_L).max() < limit
    after = one[0].weights(), other[0].weights()
    assert max(np.abs(after[0][name] - after[1][name]).max() for name in after[0]) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
class TestSameNumbers:
    @pytest.mark.parametrize("parts", [2, 4])
    def test_in_parts(self, backend, config, parts):
        engine = EngineConfig(accumulation_steps=parts)
        assert_same(trained(backend, config), trained(backend, config, engine=engine), limit=1e-6)

    def test_with_checkpointed_blocks(self, backend, config):
        engine = EngineConfig(activation_checkpointing=True)
        assert_same(trained(backend, config), trained(backend, config, engine=engine), limit=1e-6)

    def test_with_checkpointed_blocks_and_dropout(self, backend, config):
        config = config.model_copy(update={"dropout": 0.3})
        engine = EngineConfig(activation_checkpointing=True)
        assert_same(trained(backend, config), trained(backend, config, engine=engine), limit=1e-6)

    def test_in_parts_dropout_routes_once(self, backend, config):
        config = config.model_copy(update={"dropout": 0.3})
        engine = EngineConfig(accumulation_steps=2)
        _, metrics = trained(backend, config, steps=1, engine=engine)
        if config.moe:  # the load that balance was asked of is that of the tokens that were trained on
            assert metrics[0].expert_load_LE.sum(axis=1) == pytest.approx(1)
        again = trained(backend, config, steps=1, engine=engine)[1]
        assert again[0].loss == metrics[0].loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_mlx_updates_a_large_model_in_parts(config, optimizer, monkeypatch):
    at_once = trained("mlx", config, optimizer=optimizer)
    monkeypatch.setattr("mlx_moe.model.optimizers.MLX_UPDATED_AT_ONCE", 0)
    monkeypatch.setattr("mlx_moe.model.optimizers.MLX_UPDATE_PART", 30_000)
    groups = update_groups(config, OptimizerConfig(name=optimizer))
    assert len(groups) > 4
    assert sorted(name for group in groups for name in group.names) == sorted(shapes(config))
    in_parts = trained("mlx", config, optimizer=optimizer)
    assert_same(at_once, in_parts, limit=1e-6)
    state = in_parts[0].optimizer_state()
    assert state["step"] == 4
    monkeypatch.undo()
    at_once[0].load_optimizer_state(state)  # and is none of the checkpoint's business
    batch = random_tokens(config, 4, config.context_length + 1, 9)
    assert at_once[0].step(batch, LEARNING_RATE, 0)().loss == pytest.approx(
        in_parts[0].step(batch, LEARNING_RATE, 0)().loss
    )


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_compiled_blocks(config):
    engine = EngineConfig(compile=True)
    assert_same(trained("torch", config), trained("torch", config, engine=engine), limit=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.02), ("fp16", 0.003)])
def test_half_precision_is_near_and_not_the_same(backend, config, precision, limit):
    full, half = (
        trained(backend, config, steps=8, engine=EngineConfig(precision=name)) for name in ("fp32", precision)
    )
    losses = [np.array([metrics.loss for metrics in run[1]]) for run in (full, half)]
    assert 0 < np.abs(losses[0] - losses[1]).max() < limit
    assert half[0].precision.name == precision
    weights, state = half[0].weights(), half[0].optimizer_state()
    assert all(array.dtype == np.float32 for array in [*weights.values(), *state.values()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_a_step_half_precision_is_full(backend):
    config = MODELS["experts"]
    full, half = (build(backend, config, engine=EngineConfig(precision=name)) for name in ("fp32", "bf16"))
    tokens = random_tokens(config, 2, config.context_length + 1)
    assert full.loss(tokens) == half.loss(tokens)
    assert np.array_equal(full.logits(tokens[:, :-1]), half.logits(tokens[:, :-1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_fp16_survives_an_overflow(backend, config):
    trainer = build(backend, config, engine=EngineConfig(precision="fp16"))
    state = trainer.optimizer_state()
    trainer.load_optimizer_state(state | {"loss_scale": np.array(2.0**24, np.float32)})
    before, norms, losses = trainer.weights(), [], []
    for seed in range(12):
        metrics = trainer.step(random_tokens(config, 4, config.context_length + 1, seed % 2), LEARNING_RATE, 0)()
        norms.append(metrics.grad_norm)
        losses.append(metrics.loss)
        if not np.isfinite(metrics.grad_norm):
            assert all(np.array_equal(before[name], array) for name, array in trainer.weights().items())
    overflows = np.isinf(norms) | np.isnan(norms)
    assert overflows[0]
    assert not overflows[-1]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    after = trainer.optimizer_state()
    assert after["loss_scale"] == 2.0 ** (24 - overflows.sum())
    assert after["step"] == 12 - overflows.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_scale_is_part_of_the_state(backend):
    config = MODELS["dense"]
    first, _ = trained(backend, config, engine=EngineConfig(precision="fp16"))
    second = build(backend, config, first.weights(), engine=EngineConfig(precision="fp16"))
    second.load_optimizer_state(first.optimizer_state())
    assert second.optimizer_state()["good_steps"] == first.optimizer_state()["good_steps"] == 4
    unscaled = build(backend, config, first.weights())
    unscaled.load_optimizer_state(first.optimizer_state())  # a run may go on in another precision
    assert "loss_scale" not in unscaled.optimizer_state()


def test_the_loss_scale_grows_and_falls():
    scale = LossScale(scale=4.0)
    for _ in range(GROWTH_INTERVAL):
        assert scale.accepts(1.0)
    assert (scale.scale, scale.good_steps) == (8.0, 0)
    assert scale.accepts(1.0)
    for expected in (4.0, 2.0, 1.0, 1.0):
        assert not scale.accepts(np.inf)
        assert (scale.scale, scale.good_steps) == (expected, 0)


@pytest.mark.parametrize(
    ("requested", "device", "has_bf16", "name"),
    [
        ("auto", CPU, True, "fp32"),
        ("auto", METAL, True, "fp32"),
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp16"),
        ("fp32", CUDA, True, "fp32"),
        ("bf16", CPU, True, "bf16"),
    ],
)
def test_which_precision_and_why(requested, device, has_bf16, name):
    precision = choose_precision(requested, device, has_bf16)
    assert precision.name == name
    assert precision.reason.startswith(name)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_mlx_knows_no_sharding(strategy):
    with pytest.raises(InputError, match=f"engine.strategy '{strategy}': mlx knows ddp only"):
        build("mlx", MODELS["dense"], engine=EngineConfig(strategy=strategy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_needs_no_optimizer(backend):
    config = MODELS["experts"]
    weights, tokens = rough_weights(config, seed=0), random_tokens(config, 2, config.context_length + 1)
    trainer = choose_backend(backend).trainer(config, weights, device="cpu")
    expected = build(backend, config, weights)
    assert trainer.loss(tokens) == expected.loss(tokens)
    assert np.array_equal(trainer.logits(tokens[:, :-1]), expected.logits(tokens[:, :-1]))
    plan = plan_growth(config, larger_model(config), seed=1)
    for model in (trainer, trainer.apply_transfer(plan)):
        for call in (lambda model=model: model.step(tokens, 1e-3, 0), model.optimizer_state, model.lazy_state):
            with pytest.raises(InputError, match="this trainer has no optimizer"):
                call()
