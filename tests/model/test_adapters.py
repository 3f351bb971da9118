"""Low-rank adapters: the same in both backends, the gradients of the weights they stand for, and a base that stays."""

import numpy as np
import pytest
from support.small_models import (
    BACKENDS,
    FOUR_EXPERTS,
    LIMIT_LOGITS,
    build,
    largest_difference,
    random_tokens,
    rough_weights,
    small_model,
)

from mlx_moe.config import EngineConfig, OptimizerConfig
from mlx_moe.parameters import Axis, initialize, merge_lora, parameter_table, start_adapters

LORA = {"rank": 4, "alpha": 8.0}
SCALE = 2.0
# The first moments after one step are a tenth of the gradients.
OPTIMIZER = OptimizerConfig(betas=(0.9, 0.95), max_grad_norm=1e9, weight_decay=0.0)
CONFIGS = {
    "experts": small_model("smollm", moe=FOUR_EXPERTS, lora=LORA),
    "dense, with biases": small_model("simple", lora=LORA),
    "attention only, router frozen": small_model(
        "llama", moe=FOUR_EXPERTS, lora=LORA | {"targets": ["q_proj", "v_proj"], "router": False}
    ),
}


def batch_of(config, n_rows=2):
    return random_tokens(config, n_rows, config.context_length + 1)


def gradients(backend, config, weights):
    trainer = build(backend, config, weights, OPTIMIZER)
    trainer.step(batch_of(config), 0.0, 0)()
    state = trainer.optimizer_state()
    return {name[2:]: 10 * array for name, array in state.items() if name.startswith("m.")}


def trained(config):
    return {parameter.name for parameter in parameter_table(config) if parameter.is_trained}


def test_every_target_has_its_pair():
    config = CONFIGS["experts"]
    rows = {parameter.name: parameter for parameter in parameter_table(config)}
    assert rows["layers.0.mlp.experts.down_proj.lora_a"].shape == (4, 4, 96)
    assert rows["layers.0.mlp.experts.down_proj.lora_b"].shape == (4, 48, 4)
    assert rows["layers.1.self_attn.k_proj.lora_b"].shape == (16, 4)
    assert trained(config) == {name for name in rows if "lora_" in name or "router" in name}
    assert sum("lora_" in name for name in rows) == 2 * 2 * 7
    assert sum("lora_" in p.name for p in parameter_table(CONFIGS["attention only, router frozen"])) == 2 * 2 * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_start_is_exact_and_merging_too(name, backend):
    config = CONFIGS[name]
    plain, tokens = config.model_copy(update={"lora": None}), random_tokens(config)
    weights = initialize(plain, 0)
    expected = build(backend, plain, weights).logits(tokens)
    np.testing.assert_array_equal(build(backend, config, weights | start_adapters(config, 0)).logits(tokens), expected)
    adapted = rough_weights(config, seed=0)
    logits = build(backend, config, adapted).logits(tokens)
    without, weights = merge_lora(config, adapted)
    assert without == plain
    assert largest_difference(build(backend, plain, weights).logits(tokens), logits) < LIMIT_LOGITS
    base = {name: adapted[name] for name in weights}
    assert largest_difference(build(backend, plain, base).logits(tokens), logits) > 100 * LIMIT_LOGITS


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_weights_they_stand_for(name):
    """∂L/∂A = s·Bᵀ·∂L/∂W and ∂L/∂B = s·∂L/∂W·Aᵀ, with ∂L/∂W from the merged model trained in full."""
    config = CONFIGS[name]
    weights = rough_weights(config, seed=3)
    of = {backend: gradients(backend, config, weights) for backend in BACKENDS}
    assert of["mlx"].keys() == of["torch"].keys() == trained(config)
    full = gradients("torch", *merge_lora(config, weights))
    for tensor, gradient in of["torch"].items():
        module = tensor.rpartition(".")[0]
        expected = full[f"{module}.weight"]
        if tensor.endswith("lora_a"):
            expected = SCALE * weights[f"{module}.lora_b"].swapaxes(-1, -2) @ expected
        elif tensor.endswith("lora_b"):
            expected = SCALE * expected @ weights[f"{module}.lora_a"].swapaxes(-1, -2)
        limit = 1e-4 * np.linalg.norm(expected)
        assert limit > 0
        assert np.linalg.norm(gradient - expected) < limit, tensor
        assert np.linalg.norm(of["mlx"][tensor] - expected) < limit, tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_the_base_stays_and_has_no_moments(rule, backend):
    config = CONFIGS["experts"]
    trainer = build(backend, config, optimizer=OptimizerConfig(name=rule))
    before = trainer.weights()
    for seed in range(3):
        trainer.step(random_tokens(config, 2, config.context_length + 1, seed), 1e-2, 0)()
    for name, array in trainer.weights().items():
        assert np.array_equal(array, before[name]) == (name not in trained(config)), name
    state = trainer.optimizer_state()
    assert state.keys() == {"step", *(f"{moment}.{name}" for moment in "mv" for name in trained(config))}
    again = build(backend, config, trainer.weights(), OptimizerConfig(name=rule))
    again.load_optimizer_state(state)
    for one in (trainer, again):
        one.step(batch_of(config), 1e-2, 0)()
    for name, array in trainer.weights().items():
        np.testing.assert_array_equal(again.weights()[name], array)


@pytest.mark.parametrize("backend", BACKENDS)
def test_how_a_step_is_computed_does_not_matter(backend):
    config, losses = CONFIGS["experts"], []
    for engine in (EngineConfig(), EngineConfig(accumulation_steps=2, activation_checkpointing=True)):
        trainer = build(backend, config, engine=engine)
        losses.append([trainer.step(batch_of(config, 4), 1e-2, 0)().loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_torch_computes_no_gradients_of_the_base():
    config = CONFIGS["experts"]
    trainer = build("torch", config)
    assert {name for name, one in trainer._model.named_parameters() if one.requires_grad} == trained(config)


def test_adapters_have_an_axis_of_their_own():
    for parameter in parameter_table(CONFIGS["experts"]):
        assert (Axis.RANK in parameter.axes) == ("lora_" in parameter.name)
        assert len(parameter.axes) == len(parameter.shape)
