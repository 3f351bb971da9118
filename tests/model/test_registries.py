"""Every option of an architecture, by the names in its registry, and what it takes to add one."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
import torch
from support.small_models import (
    BACKENDS,
    FOUR_EXPERTS,
    LIMIT_LOGITS,
    build,
    largest_difference,
    random_tokens,
    small_model,
)

import mlx_moe.model.attention
import mlx_moe.model.layers
import mlx_moe.model.transformer
import parity.gradients
import parity.numpy_model
import torch_ref.attention
import torch_ref.layers
from mlx_moe.accounting import flops, memory
from mlx_moe.config import COMPONENTS
from mlx_moe.errors import InputError
from mlx_moe.parameters import FFN_INPUTS

REGISTRIES = {
    "normalization": ("layers", "NORMALIZATIONS"),
    "activation": ("layers", "ACTIVATIONS"),
    "position_encoding": ("attention", "POSITION_ENCODINGS"),
    "attention_backend": ("attention", "ATTENTION_BACKENDS"),
    "ffn_type": ("layers", "FFN_TYPES"),
}
OPTIONS = COMPONENTS | {
    "norm_position": ["pre", "post"],
    "bias": [True, False],
    "weight_tying": [True, False],
    "dropout": [0.0, 0.3],
}


def registries(kind):
    module, name = REGISTRIES[kind]
    return [getattr(getattr(package, module), name) for package in (mlx_moe.model, torch_ref)]


@pytest.mark.parametrize("kind", COMPONENTS)
def test_components_are_what_both_backends_know(kind):
    assert len(set(COMPONENTS[kind])) == len(COMPONENTS[kind])
    for registry in registries(kind):
        assert sorted(registry) == sorted(COMPONENTS[kind])


@pytest.mark.parametrize(
    "table",
    [
        parity.numpy_model.ACTIVATIONS,
        parity.gradients.SLOPES,
        flops.ACTIVATION,
        memory.MLX_KEPT_NEURONS["cpu"],
        memory.MLX_KEPT_NEURONS["gpu"],
        memory.MLX_WAITING_NEURONS,
    ],
    ids=["values", "slopes", "flops", "kept-cpu", "kept-gpu", "waiting"],
)
def test_every_table_of_activations_has_all_of_them(table):
    assert sorted(table) == sorted(COMPONENTS["activation"])


def test_every_ffn_type_has_its_projections():
    assert sorted(FFN_INPUTS) == sorted(COMPONENTS["ffn_type"])


def test_an_activation_is_one_function_in_each_backend(monkeypatch):
    with pytest.raises(InputError, match="squared_relu"):
        small_model("simple", activation="squared_relu")
    monkeypatch.setitem(COMPONENTS, "activation", [*COMPONENTS["activation"], "squared_relu"])
    mlx_registry, torch_registry = registries("activation")
    monkeypatch.setitem(mlx_registry, "squared_relu", lambda x: mx.square(mx.maximum(x, 0)))
    monkeypatch.setitem(torch_registry, "squared_relu", lambda x: torch.relu(x).square())
    for moe in (None, FOUR_EXPERTS):
        config = small_model("simple", activation="squared_relu", moe=moe)
        tokens, batch = random_tokens(config), random_tokens(config, n_columns=33)
        mlx, torch_, relu = build("mlx", config), build("torch", config), build("torch", small_model("simple", moe=moe))
        before = mlx.logits(tokens)
        assert largest_difference(before, torch_.logits(tokens)) < LIMIT_LOGITS
        assert largest_difference(before, relu.logits(tokens)) > 100 * LIMIT_LOGITS
        losses = [trainer.step(batch, 1e-3, dropout_seed=0)().loss for trainer in (mlx, torch_)]
        assert losses[0] == pytest.approx(losses[1], abs=5e-6)
        for trainer in (mlx, torch_):
            assert largest_difference(before, trainer.logits(tokens)) > 100 * LIMIT_LOGITS


@pytest.mark.parametrize("moe", [None, FOUR_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(option, backend, moe):
    logits = []
    for value in OPTIONS[option]:
        config = small_model("simple", moe=moe, **{option: value})
        trainer, batch = build(backend, config), random_tokens(config, n_columns=config.context_length + 1)
        logits.append(trainer.logits(batch[:, :-1]))
        before = trainer.loss(batch)
        for seed in range(4):
            metrics = trainer.step(batch, 3e-3, dropout_seed=seed)()
            assert np.isfinite([metrics.loss, metrics.grad_norm]).all()
        assert trainer.loss(batch) < before - 0.05
    same_function = option in ("attention_backend", "dropout")
    for one, other in itertools.combinations(logits, 2):
        assert (largest_difference(one, other) < LIMIT_LOGITS) == same_function


@pytest.mark.parametrize("moe", [None, FOUR_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("backend", BACKENDS)
class TestDropout:
    def test_depends_on_its_seed_only(self, backend, moe):
        config = small_model("simple", dropout=0.3, moe=moe)
        batch = random_tokens(config, n_columns=config.context_length + 1)

        def train(*seeds):
            trainer = build(backend, config)
            return [trainer.step(batch, 1e-3, seed)() for seed in seeds], trainer.weights()

        same, weights = train(1, 2)
        again, weights_again = train(1, 2)
        assert [metrics.loss for metrics in same] == [metrics.loss for metrics in again]
        assert all(np.array_equal(weights[name], weights_again[name]) for name in weights)
        others = [train(seed)[0][0].loss for seed in (0, 2)]
        assert min(abs(same[0].loss - loss) for loss in others) > 1e-4

    def test_leaves_evaluation_alone(self, backend, moe):
        config = small_model("simple", dropout=0.3, moe=moe)
        without = small_model("simple", moe=moe)
        batch = random_tokens(config, n_columns=config.context_length + 1)
        trainer = build(backend, config)
        for seed in range(2):
            plain = build(backend, without, trainer.weights())
            expected = [plain.decoder()(batch), plain.logits(batch), plain.loss(batch)]
            # Each comes right after a step, and so has to end training by itself.
            evaluations = [lambda: trainer.decoder()(batch), lambda: trainer.logits(batch), lambda: trainer.loss(batch)]
            for evaluate, value in zip(evaluations, expected, strict=True):
                assert np.array_equal(evaluate(), value)
                trainer.step(batch, 0.0, seed)()
            trainer.step(batch, 1e-3, seed)()


@pytest.mark.parametrize("moe", [None, FOUR_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_stands_in_the_same_places(norm_position, moe, monkeypatch):
    """With masks that are not random: the n-th dropout drops every third feature, starting with the n-th."""
    config = small_model("simple", norm_position=norm_position, moe=moe, dropout=0.3)
    dropped = {"mlx": 0, "torch": 0}

    def mask(backend, p):
        dropped[backend] += 1
        return ((np.arange(config.d_model) + dropped[backend]) % 3 > 0).astype(np.float32) / (1 - p)

    monkeypatch.setattr(mlx_moe.model.transformer, "dropout", lambda x, p, key: x * mx.array(mask("mlx", p)))
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x * torch.tensor(mask("torch", self.p)))
    batch = random_tokens(config, n_columns=config.context_length + 1)
    one, other = (build(backend, config).step(batch, 1e-3, dropout_seed=0)() for backend in BACKENDS)
    assert dropped == dict.fromkeys(BACKENDS, 1 + 2 * config.n_layers)  # the embeddings, and what each block adds
    assert one.loss == pytest.approx(other.loss, abs=5e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert abs(one.cross_entropy - build("torch", config.model_copy(update={"dropout": 0.0})).loss(batch)) > 1e-3
