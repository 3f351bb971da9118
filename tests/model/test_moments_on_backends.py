"""Adam's moments across a boundary on both backends: the same arrays, and the gradients that they stand for."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from support.gradients import mlx_gradients, torch_gradients
from support.small_models import BACKENDS, FOUR_EXPERTS, build, larger_model, random_tokens, rough_weights, small_model

import mlx_moe.model.trainer
import torch_ref.trainer
from mlx_moe.config import OptimizerConfig
from mlx_moe.presets import preset_names
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import apply_numpy, carry_moments
from mlx_moe.transfer.upcycling import plan_upcycling

GRADIENTS = {"mlx": mlx_gradients, "torch": torch_gradients}
NO_AUXILIARY = FOUR_EXPERTS.model_copy(update={"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.0})


def plans(name):
    dense, experts = small_model(name), small_model(name, moe=FOUR_EXPERTS)
    return [plan_upcycling(dense, FOUR_EXPERTS), plan_growth(experts, larger_model(experts), seed=2)]


@pytest.mark.parametrize("name", preset_names("architectures"))
def test_both_backends_execute_the_plans_of_moments_as_numpy_does(name):
    for plan in plans(name):
        arrays = rough_weights(plan.source_config, seed=1)
        of_mlx = {tensor: mx.array(array) for tensor, array in arrays.items()}
        of_torch = {tensor: torch.from_numpy(array) for tensor, array in arrays.items()}
        for power in (1, 2):
            moments = plan.moments(power)
            expected = apply_numpy(moments, arrays)
            for tensor in moments.tensors:
                for array in (
                    np.array(mlx_moe.model.trainer.apply_plan(tensor, of_mlx)),
                    torch_ref.trainer.apply_plan(tensor, of_torch).numpy(),
                ):
                    np.testing.assert_array_equal(array, expected[tensor.target])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["simple", "gpt2-post", "llama"])
def test_the_gradient_of_a_grown_model_is_the_one_predicted(name, backend):
    config = small_model(name, moe=NO_AUXILIARY)
    target = grow_config(config, d_model=2 * config.d_model, n_layers=config.n_layers)
    plan = plan_growth(config, target, "even")
    weights, batch = rough_weights(config, seed=3), random_tokens(config, n_columns=config.context_length + 1)
    _, before = GRADIENTS[backend](config, weights, batch)
    _, after = GRADIENTS[backend](target, apply_numpy(plan, weights), batch)
    rounding = 1e-6 * np.sqrt(sum(np.square(array).sum() for array in after.values()))
    for tensor, predicted in apply_numpy(plan.moments(1), before).items():
        assert np.linalg.norm(after[tensor] - predicted) < 1e-4 * np.linalg.norm(predicted) + rounding, tensor


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_carries_its_moments_or_starts_fresh(backend):
    for plan in plans("simple"):
        config = plan.source_config
        trainer = build(backend, config, optimizer=OptimizerConfig(eps=1e-4))
        for seed in range(3):
            trainer.step(random_tokens(config, n_columns=config.context_length + 1, seed=seed), 0.01, 0)()
        state = trainer.optimizer_state()
        reset, carried = (trainer.apply_transfer(plan, carry).optimizer_state() for carry in (False, True))
        assert not any(array.any() for array in reset.values())
        assert carried["step"] == 3
        expected = carry_moments(plan, state, carried.keys())
        assert carried.keys() == expected.keys() == reset.keys()
        for name, array in carried.items():
            np.testing.assert_array_equal(array, expected[name])
        after = trainer.apply_transfer(plan, carry=True)
        after.step(random_tokens(plan.target_config, n_columns=config.context_length + 1), 0.01, 0)()
        assert after.optimizer_state()["step"] == 4
