"""No false alarms, and no fault that goes unseen."""

import re
from dataclasses import replace

import numpy as np
import pytest
from support.small_models import FOUR_EXPERTS, larger_model, probe_model, reference_tokens, rough_weights

from mlx_moe.config import MoEConfig
from mlx_moe.errors import InputError
from mlx_moe.presets import preset_names
from mlx_moe.transfer.growth import plan_growth
from mlx_moe.transfer.plan import apply_numpy
from parity import self_test
from parity.compare import BackendPair
from parity.judgement import judge, judge_tensor
from parity.numpy_model import NumpyModel
from parity.reference_forward import Expected, ReferenceForward
from parity.report import TensorError


@pytest.fixture(scope="module")
def runner():
    return self_test.MutationRunner(seed=0)


@pytest.fixture(scope="module")
def llama():
    """(reference, MLX, torch) of a model with experts, nothing wrong with either."""
    config, weights = probe_model("llama", 0, FOUR_EXPERTS)
    pair, reference = BackendPair.build(config, weights), ReferenceForward(config, weights, reference_tokens(config, 0))
    return reference, reference.measure(pair.mlx), reference.measure(pair.torch)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", preset_names("architectures"))
def test_no_false_alarm(name, seed):
    config, weights = probe_model(name, seed, FOUR_EXPERTS if seed % 2 else None)
    if seed % 2:
        plan = plan_growth(config, larger_model(config), seed=seed)
        config, weights = plan.target_config, apply_numpy(plan, weights)
    pair, reference = (
        BackendPair.build(config, weights),
        ReferenceForward(config, weights, reference_tokens(config, seed)),
    )
    verdict = judge(reference, reference.measure(pair.mlx), reference.measure(pair.torch))
    assert verdict.passed, verdict.first_fault()
    assert 0 < verdict.logits.floor.rmse < verdict.logits.mlx.rmse
    assert verdict.impact.top1_agreement > 0.98
    assert abs(verdict.impact.kl) < 1e-9


def test_no_false_alarm_where_sums_are_long():
    """MLX's CPU norms add up one after the other; on 1,024 numbers that costs five times what PyTorch's order does."""
    config, weights = probe_model("llama", 0)
    config = config.model_copy(update={"d_model": 1024, "n_layers": 1, "d_ff": 32, "vocab_size": 32})
    weights = rough_weights(config, seed=0)
    pair, reference = (
        BackendPair.build(config, weights),
        ReferenceForward(config, weights, reference_tokens(config, 0)[:, :32]),
    )
    verdict = judge(reference, reference.measure(pair.mlx), reference.measure(pair.torch))
    assert verdict.passed, verdict.first_fault()


def test_there_are_enough_mutations():
    names = [mutation.name for mutation in self_test.MUTATIONS]
    assert len(set(names)) == len(names) >= 20
    for asked in ("norm ε 1e-6 -> 1e-8", "RoPE θ 10,000 -> 10,000.1", "one matrix through fp16"):
        assert asked in names


@pytest.mark.parametrize("mutation", self_test.MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_is_caught(mutation, runner):
    assert not runner.judge(mutation).passed


@pytest.mark.parametrize("make", self_test.SIZED.values(), ids=self_test.SIZED)
def test_a_fault_of_no_size_is_none(make, runner):
    assert runner.judge(make(0.0)).passed


def test_a_mutation_is_taken_back(runner):
    import torch_ref.attention

    before = dict(torch_ref.attention.ATTENTION_BACKENDS)
    runner.judge(self_test.SIZED["attention scale"](0.1))
    assert before == torch_ref.attention.ATTENTION_BACKENDS


def test_both_backends_with_the_same_fault_fail():
    """They agree to the last digits, as any comparison of the two would find."""
    config, weights = probe_model("llama", 0)
    wrong = config.model_copy(update={"norm_eps": 1e-8})
    pair, reference = BackendPair.build(wrong, weights), ReferenceForward(config, weights, reference_tokens(config, 0))
    verdict = judge(reference, reference.measure(pair.mlx), reference.measure(pair.torch))
    assert verdict.impact.max_logit_difference < 1e-5
    assert verdict.first_place() == "layers.0.input_layernorm"
    assert "plain float32" in verdict.first_fault()


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("one matrix through fp16", "layers.1.mlp.down_proj"),
        ("attention scale off by 0.001", "layers.0.self_attn"),
        ("an expert's bias dropped", "layers.1.mlp.experts"),
        ("router through bf16", "layers.0.mlp.router"),
        ("norms after, not before", "the whole model (lm_head)"),
        ("ties to the higher expert", "routing"),
    ],
)
def test_the_first_wrong_module_is_named(fault, place, runner):
    mutation = next(mutation for mutation in self_test.MUTATIONS if mutation.name == fault)
    verdict = runner.judge(mutation)
    assert verdict.first_place() == place
    assert "torch" in verdict.first_fault()
    assert place == "routing" or re.search(r" at \[\d+.*Reference there: shape [\d×]+, mean", verdict.first_fault())


def test_a_model_that_differs_without_a_fault_cannot_be_tested(monkeypatch):
    import torch_ref.layers

    monkeypatch.setitem(torch_ref.layers.ACTIVATIONS, "silu", torch_ref.layers.ACTIVATIONS["gelu"])
    with pytest.raises(InputError, match="without any fault"):
        self_test.MutationRunner(seed=0).judge(self_test.SIZED["one matrix"](0.1))


def test_errors():
    reference = np.array([1.0, 2.0, 3.0])
    error = TensorError.between(np.array([1.0, 2.5, 3.0], np.float32), reference)
    assert (error.largest, error.place, error.found, error.expected) == (0.5, (1,), 2.5, 2.0)
    assert error.rmse == pytest.approx(0.5 / 3**0.5)
    for broken in (np.array([1.0, np.nan, 3.0]), np.ones(2)):
        assert TensorError.between(broken, reference).rmse == np.inf


@pytest.mark.parametrize(
    ("mlx", "torch", "passes"),
    [(1.0, 1.0, True), (1.9, 0.1, True), (2.1, 0.1, False), (0.1, 2.1, False), (2.9, 2.9, True), (3.1, 3.1, False)],
)
def test_the_gates(mlx, torch, passes):
    errors = [TensorError(times * 1e-7, times * 1e-7) for times in (mlx, torch, 1.0)]
    expected = Expected(np.ones(3), TensorError(1e-8, 1e-8), errors[2])
    assert judge_tensor("x", "module", *errors[:2], expected).passed == passes


@pytest.mark.parametrize("infinite", [["mlx"], ["torch"], ["mlx", "torch"]], ids=str)
def test_what_is_not_finite_fails(infinite):
    errors = {
        name: TensorError(np.inf, np.inf) if name in infinite else TensorError(1e-7, 1e-7) for name in ("mlx", "torch")
    }
    expected = Expected(np.ones(3), TensorError(1e-8, 1e-8), TensorError(1e-7, 1e-7))
    assert not judge_tensor("x", "module", *errors.values(), expected).passed


def test_a_flip_is_excused_by_the_routers_errors_only(llama):
    reference, mlx, torch = llama
    layer, token = np.unravel_index(np.where(reference.margin_LN > 0, reference.margin_LN, np.inf).argmin(), (2, 256))
    flipped_LN = np.zeros_like(mlx.routes.flipped_LN)
    flipped_LN[layer, token] = True
    for share, excused in ((0.6, True), (0.4, False)):
        error_LN = np.where(flipped_LN, share * reference.margin_LN, 0.0)
        routes = replace(mlx.routes, flipped_LN=flipped_LN, error_LN=error_LN)
        verdict = judge(
            reference, replace(mlx, routes=routes), replace(torch, routes=replace(torch.routes, error_LN=error_LN))
        )
        assert verdict.passed == excused
        assert verdict.flips == excused
        assert excused or f"layer {layer} at token {token}" in verdict.first_fault()


def test_after_a_flip_all_is_judged_by_the_truths_routes():
    """A tie up to rounding: the third expert's router is the first's, but for less than float32 can hold in a sum."""
    config, weights = probe_model("llama", 0, MoEConfig(n_experts=3, top_k=1))
    for layer in range(config.n_layers):
        router_ED = weights[f"layers.{layer}.mlp.router.weight"]
        router_ED[:] = router_ED[0] * (1 + 3e-8 * np.arange(-1, 2)[:, None])
        router_ED[1:, ::2] = np.nextafter(router_ED[1:, ::2], np.float32(1))
    pair, reference = BackendPair.build(config, weights), ReferenceForward(config, weights, reference_tokens(config, 0))
    free = pair.torch.routed_logits(reference.tokens_BT)
    assert (free.experts_LNK != reference.experts_LNK).any()
    assert np.abs(free.logits_BTV - reference.logits_BTV).max() > 1e-3
    verdict = judge(reference, reference.measure(pair.mlx), reference.measure(pair.torch))
    assert verdict.passed, verdict.first_fault()
    assert verdict.flips


def test_margins(llama):
    reference, *_ = llama
    logits_LNE = NumpyModel(reference.config, probe_model("llama", 0, FOUR_EXPERTS)[1])(
        reference.tokens_BT
    ).router_logits_LNE
    falling_LNE = -np.sort(-logits_LNE, axis=-1)
    np.testing.assert_array_equal(reference.margin_LN, falling_LNE[..., 1] - falling_LNE[..., 2])
