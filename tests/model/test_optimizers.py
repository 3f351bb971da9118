"""Muon: against PyTorch's, against float64, MLX against PyTorch; who takes it; optimizers' state."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from support.small_models import BACKENDS, FOUR_EXPERTS, build, random_tokens, rough_weights, small_model

import mlx_moe.model.optimizers as on_mlx
import torch_ref.optimizers as on_torch
from mlx_moe.config import EngineConfig, OptimizerConfig
from mlx_moe.errors import InputError
from mlx_moe.parameters import optimizer_groups, optimizer_table, parameter_table
from mlx_moe.training.step_settings import StepSettings
from torch_ref.distributed import ProcessGroup

MUON = OptimizerConfig(name="muon", weight_decay=1.0)
MODELS = [
    pytest.param(small_model("smollm"), id="dense"),
    pytest.param(small_model("gpt2", moe=FOUR_EXPERTS), id="experts"),
]
LEARNING_RATE = 0.01
LIMIT_LOSS = 1e-5
SHAPES = {"tall": (48, 16), "wide": (16, 48), "square": (32, 32)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.95, 0.1), (0.5, 0.0)])
def test_torch_muon_is_pytorchs_on_matrices(shape, momentum, weight_decay):
    start, gradients = normal(shape, seed=0), [normal(shape, seed) for seed in range(1, 5)]
    options = {"lr": 0.02, "momentum": momentum, "weight_decay": weight_decay}
    theirs = step_torch(lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", **options), start, gradients)
    ours = step_torch(lambda p: on_torch.Muon(p, dtype=torch.bfloat16, **options), start, gradients)
    in_float32 = step_torch(lambda p: on_torch.Muon(p, **options), start, gradients)
    moved = np.abs(theirs - start).max()
    assert np.abs(ours - theirs).max() < 1e-2 * moved
    assert 1e-4 * moved < np.abs(in_float32 - theirs).max() < 5e-2 * moved  # what bfloat16 rounds away


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_follow_the_quintic(shape, backend):
    left, _, right = np.linalg.svd(normal(shape, seed=1).astype(np.float64), full_matrices=False)
    values = np.geomspace(1, 0.01, min(shape))
    matrix = (left * values @ right).astype(np.float32)
    expected = values / np.linalg.norm(values)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = orthogonalize(backend, matrix)
    np.testing.assert_allclose(found, left * expected @ right, atol=2e-6)
    assert expected.min() > 0.68
    assert expected.max() < 1.21


@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_values_of_any_gradient_lie_in_the_band(backend):
    for seed, shape in enumerate([(1, 9), (7, 1), (3, 40, 24), (2, 24, 40), (64, 64)]):
        values = np.linalg.svd(orthogonalize(backend, 1e-3 * normal(shape, seed)), compute_uv=False)
        assert values.min() > 0.15, shape  # a square random matrix has some near 0
        assert np.quantile(values, 0.1) > 0.68
        assert values.max() < 1.21


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_0_gives_a_direction_of_0(backend):
    experts = normal((3, 8, 16), seed=0)
    experts[1] = 0
    directions = orthogonalize(backend, experts)
    assert not directions[1].any()
    assert np.linalg.svd(directions[[0, 2]], compute_uv=False).min() > 0.68


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_stack_is_as_many_matrices(shape, backend):
    start, gradients = normal((3, *shape), seed=0), [normal((3, *shape), seed) for seed in range(1, 4)]
    together = step(backend, start, gradients)
    for expert in range(3):
        alone = step(backend, start[expert], [gradient[expert] for gradient in gradients])
        np.testing.assert_allclose(together[expert], alone, atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("config", MODELS)
def test_the_backends_step_alike_on_the_same_gradients(config, rule):
    optimizer = OptimizerConfig(name=rule)
    weights = rough_weights(config, seed=0)
    mlx_weights = tree(weights)
    settings = StepSettings(config, optimizer, EngineConfig(), "fp32")
    mlx_optimizer = on_mlx.build_optimizer(dict(tree_flatten(mlx_weights)), settings)
    mlx_optimizer.learning_rate = LEARNING_RATE
    parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in weights.items()}
    torch_optimizer = on_torch.build_optimizer(parameters, settings, ProcessGroup(0, 1))
    torch_optimizer.learning_rate = LEARNING_RATE
    for seed in range(1, 5):
        gradients = {name: array * np.float32(1e-3) for name, array in rough_weights(config, seed).items()}
        mlx_weights = mlx_optimizer.apply_gradients(tree(gradients), mlx_weights)
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        torch_optimizer.step()
    for name, array in tree_flatten(mlx_weights):
        mlx_, torch_ = np.array(array), parameters[name].detach().numpy()
        moved = np.linalg.norm(torch_ - weights[name])
        assert moved > LEARNING_RATE
        assert np.linalg.norm(mlx_ - torch_) < 1e-5 * moved, name


@pytest.mark.parametrize("config", MODELS)
def test_the_trainers_step_alike(config):
    trainers = [build(backend, config, optimizer=MUON) for backend in BACKENDS]
    for seed in range(3):
        mlx_, torch_ = (trainer.step(batch(config, seed), LEARNING_RATE, dropout_seed=0)() for trainer in trainers)
        assert mlx_.loss == pytest.approx(torch_.loss, abs=LIMIT_LOSS)


@pytest.mark.parametrize("config", MODELS)
def test_who_takes_muon(config):
    muon, decayed, rest = (set(group.names) for group in optimizer_groups(config, MUON))
    names = {parameter.name for parameter in parameter_table(config)}
    assert muon == {name for name in names if re.search(r"\.(q|k|v|o|gate|up|down)_proj\.weight$", name)}
    assert decayed == {name for name in names if name.startswith(("embed", "lm_head")) or "router" in name}
    assert rest == names - muon - decayed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS)
def test_the_rest_goes_as_with_adamw(config, backend):
    adamw, muon = (
        build(backend, config, optimizer=MUON.model_copy(update={"name": name})) for name in ("adamw", "muon")
    )
    for trainer in (adamw, muon):
        trainer.step(batch(config), LEARNING_RATE, dropout_seed=0)()
    adamw, muon = adamw.weights(), muon.weights()
    same = {name for name in adamw if np.array_equal(adamw[name], muon[name])}
    assert same == {parameter.name for parameter in parameter_table(config) if not parameter.is_hidden_matrix}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS)
def test_what_decays_under_muon(config, backend):
    after = []
    for weight_decay in (0.0, 1.0):
        trainer = build(backend, config, optimizer=MUON.model_copy(update={"weight_decay": weight_decay}))
        trainer.step(batch(config), LEARNING_RATE, dropout_seed=0)()
        after.append(trainer.weights())
    before = rough_weights(config, seed=0)
    for parameter in parameter_table(config):
        without, with_ = (weights[parameter.name] for weights in after)
        decay = LEARNING_RATE * before[parameter.name] * parameter.is_matrix
        np.testing.assert_allclose(without - with_, decay, atol=1e-6)


@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("config", MODELS)
def test_muons_state_moves(config, source, target):
    stays = build(source, config, optimizer=MUON)
    for seed in range(2):
        stays.step(batch(config, seed), LEARNING_RATE, dropout_seed=0)()
    state = stays.optimizer_state()
    assert {name: array.shape for name, array in state.items()} == optimizer_table(config, MUON)
    moved, forgetful = (build(target, config, stays.weights(), MUON) for _ in range(2))
    moved.load_optimizer_state(state)
    trainers = (stays, moved, forgetful)
    for seed in range(2, 4):
        losses = [trainer.step(batch(config, seed), LEARNING_RATE, dropout_seed=0)().loss for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=LIMIT_LOSS)
    assert abs(losses[0] - losses[2]) > 100 * LIMIT_LOSS
    if source == target:
        after = [trainer.weights() | trainer.optimizer_state() for trainer in (stays, moved)]
        assert all(np.array_equal(after[0][name], after[1][name]) for name in after[0])
    assert moved.optimizer_state()["step"] == 4


@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("target", BACKENDS)
def test_muons_state_before_the_first_step(source, target):
    config = MODELS[0].values[0]
    state = build(source, config, optimizer=MUON).optimizer_state()
    assert {name: array.shape for name, array in state.items()} == optimizer_table(config, MUON)
    assert not any(array.any() for array in state.values())
    loaded, fresh = (build(target, config, optimizer=MUON) for _ in range(2))
    loaded.load_optimizer_state(state)
    for trainer in (loaded, fresh):
        trainer.step(batch(config), LEARNING_RATE, dropout_seed=0)()
    assert all(np.array_equal(loaded.weights()[name], array) for name, array in fresh.weights().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_optimizers_state_is_refused(backend):
    config, wider = (small_model("smollm", d_model=d_model) for d_model in (48, 96))
    adamw, muon = (build(backend, config, optimizer=OptimizerConfig(name=name)) for name in ("adamw", "muon"))
    other = build(backend, wider)
    for trainer, state, words in [
        (adamw, muon.optimizer_state(), ["no v.layers.0.self_attn.q_proj.weight", "optimizer.name adamw"]),
        (muon, adamw.optimizer_state(), ["v.layers.0.mlp.down_proj.weight (14 such)", "optimizer.name muon"]),
        (adamw, other.optimizer_state(), ["m.embed_tokens.weight has shape (256, 96), not (256, 48)"]),
    ]:
        with pytest.raises(InputError) as error:
            trainer.load_optimizer_state(state)
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", MODELS)
def test_it_learns(config, backend, name):
    trainer = build(backend, config, optimizer=OptimizerConfig(name=name))
    losses = [trainer.step(batch(config), LEARNING_RATE / 3, dropout_seed=0)().cross_entropy for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch(config, seed=0):
    return random_tokens(config, n_rows=4, n_columns=config.context_length + 1, seed=seed)


def tree(arrays):
    return tree_unflatten([(name, mx.array(array)) for name, array in arrays.items()])


def orthogonalize(backend, matrices):
    if backend == "mlx":
        return np.array(on_mlx.orthogonalize(mx.array(matrices)))
    return on_torch.orthogonalize(torch.tensor(matrices)).numpy()


def step(backend, start, gradients):
    """The weights after a step of Muon with each gradient."""
    if backend == "torch":
        return step_torch(lambda parameters: on_torch.Muon(parameters, lr=0.02), start, gradients)
    optimizer, tree = on_mlx.Muon(0.02), {"weight": mx.array(start)}
    for gradient in gradients:
        tree = optimizer.apply_gradients({"weight": mx.array(gradient)}, tree)
    return np.array(tree["weight"])


def step_torch(build_optimizer, start, gradients):
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = build_optimizer([parameter])
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy()
