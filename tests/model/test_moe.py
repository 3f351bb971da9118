"""Routing, dispatch and auxiliary losses of both backends against plain NumPy loops in float64."""

import math

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from support.small_models import BACKENDS, build, random_tokens, rough_weights, small_model

import mlx_moe.model.moe as mlx_moe_layers
import torch_ref.moe as torch_moe_layers
from mlx_moe.config import MoEConfig, OptimizerConfig
from mlx_moe.kernel_sizes import MLX_EXPERT_ROWS
from mlx_moe.model.cpu.experts import dispatch_padded
from mlx_moe.model.moe import dispatch_sorted
from mlx_moe.model.transformer import Transformer as MLXTransformer
from mlx_moe.transfer.upcycling import plan_upcycling
from torch_ref.transformer import Transformer as TorchTransformer


def route(backend, logits_NE, k):
    if backend == "mlx":
        experts_NK = mlx_moe_layers.choose_experts(mx.array(logits_NE), k)
        return np.array(experts_NK), np.array(mlx_moe_layers.gate_weights(mx.array(logits_NE), experts_NK))
    experts_NK = torch_moe_layers.choose_experts(torch.tensor(logits_NE), k)
    return experts_NK.numpy(), torch_moe_layers.gate_weights(torch.tensor(logits_NE), experts_NK).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
class TestRoute:
    @pytest.mark.parametrize(
        ("logits", "k", "experts"),
        [
            ([0, 0, 0, 0], 2, [0, 1]),
            ([0, 0, 0, 0], 4, [0, 1, 2, 3]),
            ([1, 3, 3, 2], 3, [1, 2, 3]),
            ([1, 2, 1, 2], 3, [1, 3, 0]),
            ([-5, -1, -9, -1], 2, [1, 3]),
            ([7], 1, [0]),
        ],
    )
    def test_ties_go_to_the_lowest_index(self, backend, logits, k, experts):
        assert route(backend, np.array([logits], np.float32), k)[0].tolist() == [experts]

    @pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (64, 8), (5, 5), (3, 1)])
    def test_order_is_that_of_a_stable_sort(self, backend, n_experts, k):
        logits_NE = np.random.default_rng(0).integers(-3, 4, (300, n_experts)).astype(np.float32)
        experts_NK, _ = route(backend, logits_NE, k)
        assert np.array_equal(experts_NK, np.argsort(-logits_NE, axis=-1, kind="stable")[:, :k])

    @pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (64, 8), (5, 5), (3, 1)])
    def test_gates_are_renormalised_probabilities(self, backend, n_experts, k):
        logits_NE = np.random.default_rng(1).normal(0, 5, (300, n_experts)).astype(np.float32)
        experts_NK, gates_NK = route(backend, logits_NE, k)
        odds_NE = np.exp(logits_NE.astype(np.float64) - logits_NE.max(axis=-1, keepdims=True))
        probabilities_NE = odds_NE / odds_NE.sum(axis=-1, keepdims=True)
        chosen_NK = np.take_along_axis(probabilities_NE, experts_NK, axis=-1)
        assert gates_NK.dtype == np.float32
        assert np.abs(gates_NK - chosen_NK / chosen_NK.sum(axis=-1, keepdims=True)).max() < 1e-6
        assert np.abs(gates_NK.sum(axis=-1) - 1).max() < 1e-6
        assert (np.diff(gates_NK, axis=-1) <= 0).all()

    def test_large_logits_stay_finite(self, backend):
        _, gates_NK = route(backend, np.array([[1e4, -1e4, 1e4]], np.float32), 2)
        assert gates_NK.tolist() == [[0.5, 0.5]]


def silu(x):
    return x / (1 + np.exp(-x))


gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))


def expert_weights(config, seed=0):
    """One layer's experts, drawn far from each other."""
    generator = np.random.default_rng(seed)
    prefix = "layers.0.mlp.experts."
    names = {name: array.shape for name, array in rough_weights(config, 0).items() if name.startswith(prefix)}
    return {name[len(prefix) :]: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in names.items()}


def plain_experts(config, weights, x_ND, experts_NK):
    """(N, K, D): each token through each of its experts, one after the other."""

    def project(name, x, expert):
        y = weights[f"{name}.weight"][expert].astype(np.float64) @ x
        return y + weights[f"{name}.bias"][expert] if config.bias else y

    def ffn(x, expert):
        up = project("up_proj", x, expert)
        hidden = silu(project("gate_proj", x, expert)) * up if config.ffn_type == "swiglu" else gelu(up)
        return project("down_proj", hidden, expert)

    return np.array([[ffn(x, expert) for expert in experts] for x, experts in zip(x_ND, experts_NK, strict=True)])


def mlx_experts(config, weights):
    experts = mlx_moe_layers.Experts(config, config.moe)
    return experts.load_weights([(name, mx.array(array)) for name, array in weights.items()])


def torch_experts(config, weights):
    experts = torch_moe_layers.Experts(config, config.moe)
    experts.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return experts


def assignments(kind, n_tokens, n_experts, k):
    """(N, K) experts, all different within a row."""
    generator = np.random.default_rng(2)
    order_NE = generator.permuted(np.tile(np.arange(n_experts), (n_tokens, 1)), axis=1)
    if kind == "one takes all":
        order_NE = np.tile(np.roll(np.arange(n_experts), 1), (n_tokens, 1))
    if kind == "the first gets none":
        order_NE = order_NE[order_NE > 0].reshape(n_tokens, -1)
    if kind == "the last gets none":
        order_NE = order_NE[order_NE < n_experts - 1].reshape(n_tokens, -1)
    return order_NE[:, :k].astype(np.int32)


ASSIGNMENTS = ["any", "one takes all", "the first gets none", "the last gets none"]
SIZES = [(1, 1), (5, 2), (MLX_EXPERT_ROWS, 1), (MLX_EXPERT_ROWS + 1, 1), (97, 2), (2 * MLX_EXPERT_ROWS, 3)]
DIMENSIONS = [(16, 32), (9, 7), (12, 6), (5, 8)]  # whole 16 bytes or not, in and out
LAYERS = [
    {"ffn_type": "swiglu", "activation": "silu", "bias": False},
    {"ffn_type": "swiglu", "activation": "silu", "bias": True},
    {"ffn_type": "standard", "activation": "gelu", "bias": True},
]


def experts_config(k, d_model=16, d_ff=32, **layer):
    size = {"d_model": d_model, "d_ff": d_ff, "n_heads": 1, "head_dim": 4, "n_layers": 1}
    return small_model("simple", moe=MoEConfig(n_experts=4, top_k=k), **size, **layer)


def check_dispatch(config, n_tokens, kind):
    weights = expert_weights(config)
    x_ND = np.random.default_rng(3).normal(size=(n_tokens, config.d_model)).astype(np.float32)
    experts_NK = assignments(kind, n_tokens, 4, config.moe.top_k)
    expected_NKD = plain_experts(config, weights, x_ND, experts_NK)
    ours = mlx_experts(config, weights)
    x, experts = mx.array(x_ND), mx.array(experts_NK)
    theirs, arguments = torch_experts(config, weights), (torch.tensor(x_ND), torch.tensor(experts_NK).long())
    results = {
        "MLX": ours(x, experts),
        "MLX in blocks": dispatch_padded(ours._ffn, x, experts, 4),
        "MLX in rows": dispatch_sorted(ours._ffn, x, experts, 4),
        "torch": theirs(*arguments).detach().numpy(),
    }
    for name, result in results.items():
        assert result.shape == expected_NKD.shape, name
        assert np.abs(np.array(result) - expected_NKD).max() < 1e-5, name
    gates_NK = np.random.default_rng(6).uniform(size=experts_NK.shape).astype(np.float32)
    y_ND = theirs(*arguments, torch.tensor(gates_NK)).detach().numpy()
    assert np.abs(y_ND - (expected_NKD * gates_NK[..., None]).sum(axis=1)).max() < 1e-5


@pytest.mark.parametrize("kind", ASSIGNMENTS)
@pytest.mark.parametrize(("n_tokens", "k"), SIZES)
def test_every_assignment_is_computed(n_tokens, k, kind):
    check_dispatch(experts_config(k, **LAYERS[0]), n_tokens, kind)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("d_model", "d_ff"), DIMENSIONS)
def test_every_dimension_is_computed(d_model, d_ff, layer):
    for kind in ASSIGNMENTS:
        check_dispatch(experts_config(2, d_model, d_ff, **layer), 70, kind)


@pytest.mark.parametrize("kind", ASSIGNMENTS)
@pytest.mark.parametrize(("n_tokens", "k"), SIZES)
def test_gradients_do_not_depend_on_the_dispatch(n_tokens, k, kind):
    config = experts_config(k, **LAYERS[1])
    weights = expert_weights(config)
    generator = np.random.default_rng(4)
    x_ND = generator.normal(size=(n_tokens, config.d_model)).astype(np.float32)
    experts_NK = assignments(kind, n_tokens, 4, k)
    direction = generator.normal(size=(n_tokens, config.d_model)).astype(np.float32)
    gates_NK = generator.uniform(size=(n_tokens, k)).astype(np.float32)

    def mlx_gradients(dispatch):
        def scalar(parameters, x, gates):
            ours = mlx_experts(config, parameters)
            y_NKD = dispatch(ours._ffn, x, mx.array(experts_NK), 4)
            return ((y_NKD * gates[..., None]).sum(axis=1) * mx.array(direction)).sum()

        of_weights, of_x, of_gates = mx.grad(scalar, argnums=(0, 1, 2))(
            {name: mx.array(array) for name, array in weights.items()}, mx.array(x_ND), mx.array(gates_NK)
        )
        inputs = {"x": np.array(of_x), "gates": np.array(of_gates)}
        return {name: np.array(array) for name, array in of_weights.items()} | inputs

    theirs = torch_experts(config, weights)
    inputs = {"x": torch.tensor(x_ND, requires_grad=True), "gates": torch.tensor(gates_NK, requires_grad=True)}
    y_ND = theirs(inputs["x"], torch.tensor(experts_NK).long(), inputs["gates"])
    (y_ND * torch.tensor(direction)).sum().backward()
    expected = {name: leaf.grad.numpy() for name, leaf in [*theirs.named_parameters(), *inputs.items()]}
    for dispatch in (dispatch_padded, dispatch_sorted):
        gradients = mlx_gradients(dispatch)
        assert set(gradients) == set(expected)
        for name, gradient in expected.items():
            error = np.linalg.norm(gradients[name] - gradient)
            assert error < 1e-5 * np.linalg.norm(gradient), (dispatch.__name__, name)


def routings(logits_NE, k):
    experts_NK = np.argsort(-logits_NE, axis=-1, kind="stable")[:, :k]
    yield mlx_moe_layers, mlx_moe_layers.Routing(mx.array(logits_NE), mx.array(experts_NK.astype(np.int32)))
    yield torch_moe_layers, torch_moe_layers.Routing(torch.tensor(logits_NE), torch.tensor(experts_NK))


@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (4, 1), (3, 3)])
def test_auxiliary_loss_is_the_formula(n_experts, k):
    logits_NE = np.random.default_rng(5).normal(0, 2, (200, n_experts)).astype(np.float32)
    exact_NE = logits_NE.astype(np.float64)
    probabilities_NE = np.exp(exact_NE) / np.exp(exact_NE).sum(axis=-1, keepdims=True)
    chosen_NK = np.argsort(-logits_NE, axis=-1, kind="stable")[:, :k]
    share_E = np.bincount(chosen_NK.ravel(), minlength=n_experts) / chosen_NK.size
    balance = n_experts * (share_E * probabilities_NE.mean(axis=0)).sum()
    z = (np.log(np.exp(exact_NE).sum(axis=-1)) ** 2).mean()
    for layers, routing in routings(logits_NE, k):
        share = np.array(layers.expert_load(routing).tolist())
        assert np.abs(share - share_E).max() < 1e-6
        assert share.sum() == pytest.approx(1, abs=1e-6)
        for alpha, beta in ((1, 0), (0, 1), (0.01, 0.001)):
            config = MoEConfig(n_experts=n_experts, top_k=k, load_balance_coefficient=alpha, z_loss_coefficient=beta)
            expected = alpha * balance + beta * z
            assert float(layers.auxiliary_loss(routing, layers.expert_load(routing), config)) == pytest.approx(
                expected, rel=1e-5
            )


def test_balance_is_1_when_even_and_more_when_not():
    config = MoEConfig(n_experts=4, top_k=1, load_balance_coefficient=1, z_loss_coefficient=0)
    even = np.eye(4, dtype=np.float32)[np.arange(40) % 4] * 5
    for layers, routing in routings(even, 1):
        assert float(layers.auxiliary_loss(routing, layers.expert_load(routing), config)) == pytest.approx(1, rel=1e-6)
    for layers, routing in routings(np.tile(even[:1], (40, 1)), 1):
        assert float(layers.auxiliary_loss(routing, layers.expert_load(routing), config)) > 3.8


def router_gradients(backend, config, weights, batch):
    """Of the cross entropy alone, the first layer's router first."""
    if backend == "mlx":
        model = MLXTransformer(config)
        model.load_weights([(name, mx.array(array)) for name, array in weights.items()])

        def loss(tokens):
            return mlx.nn.losses.cross_entropy(model(tokens[:, :-1])[0], tokens[:, 1:], reduction="mean")

        gradients = {n: np.array(g) for n, g in tree_flatten(mlx.nn.value_and_grad(model, loss)(mx.array(batch))[1])}
    else:
        model = TorchTransformer(config)
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        tokens = torch.from_numpy(batch).long()
        logits = model(tokens[:, :-1])[0].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return [gradients[f"layers.{layer}.mlp.router.weight"] for layer in range(config.n_layers)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gpt2", "smollm"])
def test_a_random_router_learns_and_a_zero_router_never_does(name, backend):
    config = small_model(name)
    dense = build(backend, config, optimizer=OptimizerConfig(weight_decay=0))
    moe = MoEConfig(n_experts=4, top_k=2, load_balance_coefficient=0, z_loss_coefficient=0)
    batches = [random_tokens(config, n_columns=config.context_length + 1, seed=seed) for seed in range(4)]
    for router_init in ("random", "zero"):
        trainer = dense.apply_transfer(plan_upcycling(config, moe, router_init))
        born = router_gradients(backend, trainer.config, trainer.weights(), batches[0])
        # Identical experts: whoever is chosen, the output is the same.
        assert all(np.abs(gradient).max() < 1e-8 for gradient in born)
        for batch in batches:
            trainer.step(batch, 1e-3, dropout_seed=0)()
        weights = trainer.weights()
        for layer, gradient in enumerate(router_gradients(backend, trainer.config, weights, batches[0])):
            router = weights[f"layers.{layer}.mlp.router.weight"]
            up_E = weights[f"layers.{layer}.mlp.experts.up_proj.weight"]
            if router_init == "random":
                assert np.abs(gradient).max() > 1e-6
                assert all(not np.array_equal(up_E[i], up_E[j]) for i in range(4) for j in range(i))
            else:
                assert not gradient.any()
                assert not router.any()
                assert np.array_equal(up_E[0], up_E[1])
                assert np.array_equal(up_E[2], up_E[3])
                assert not np.array_equal(up_E[0], up_E[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_router_among_different_experts_has_a_gradient(backend):
    config = small_model("smollm", moe=MoEConfig(n_experts=4, top_k=2))
    batch = random_tokens(config, n_columns=config.context_length + 1)
    for gradient in router_gradients(backend, config, rough_weights(config, seed=6), batch):
        assert (np.abs(gradient).max(axis=-1) > 1e-6).all()
