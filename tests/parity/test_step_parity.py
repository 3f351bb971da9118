"""A training step and the cache, judged: no false alarm, and no fault that goes unseen."""

import numpy as np
import pytest
from support.small_models import FOUR_EXPERTS, probe_model, reference_tokens

from parity.compare import BackendPair
from parity.decoding import judge_decoding
from parity.reference_forward import ReferenceForward
from parity.step_parity import judge_step, step_tokens


def prepared(name, moe=None, seed=0):
    config, weights = probe_model(name, seed, moe)
    reference = ReferenceForward(config, weights, reference_tokens(config, seed))
    return config, weights, reference, step_tokens(reference, seed)


def failed(judged):
    return [tensor.name for tensor in judged if not tensor.passed]


@pytest.mark.parametrize(("name", "moe"), [("gpt2-post", None), ("smollm", FOUR_EXPERTS)], ids=["dense", "experts"])
def test_no_false_alarm(name, moe):
    config, weights, reference, tokens = prepared(name, moe, seed=3)
    steps = judge_step(config, weights, tokens)
    assert failed(steps) == []
    names = {tensor.name for tensor in steps if tensor.scope == "half"}
    assert {f"gradient of {name} in {half}" for name in ("norm.weight",) for half in ("bf16", "fp16")} <= names
    pair = BackendPair.build(config, weights)
    decoded, faults = judge_decoding(reference, pair.mlx, pair.torch)
    assert (failed(decoded), faults) == ([], [])
    assert len(decoded) == 3


def gradient_of_gates_lost(gate):
    return lambda logits, experts: gate(logits, experts).detach()


@pytest.mark.parametrize(
    ("module", "attribute", "change", "first"),
    [
        ("torch_ref.moe", "gate_weights", gradient_of_gates_lost, "gradient of layers.0.mlp.router.weight"),
        (
            "torch_ref.step",
            "auxiliary_loss",
            lambda old: lambda routing, load, moe: old(routing, load * 1.001, moe),
            "gradient of",
        ),
    ],
)
def test_a_wrong_gradient_is_named(module, attribute, change, first, monkeypatch):
    """Of code whose outputs are right."""
    import importlib

    config, weights, _, tokens = prepared("llama", FOUR_EXPERTS)
    owner = importlib.import_module(module)
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    names = failed(judge_step(config, weights, tokens))
    assert any(name.startswith(first) for name in names)


def test_what_is_wrong_in_half_precision_only_is_named(monkeypatch):
    import torch

    import torch_ref.layers

    config, weights, _, tokens = prepared("llama")
    own = torch.nn.functional.linear

    def coarse(x, weight, bias):
        return own(x, weight.bfloat16().to(x.dtype) if x.dtype is torch.float16 else weight, bias)

    monkeypatch.setattr(torch_ref.layers.F, "linear", coarse)
    names = failed(judge_step(config, weights, tokens))
    assert names
    assert all(name.endswith("in fp16") for name in names)


def test_a_step_that_overflows_is_taken_again_with_a_smaller_scale(monkeypatch):
    import mlx_moe.precision

    monkeypatch.setattr(mlx_moe.precision.LossScale, "scale", 2.0**24)
    config, weights, _, tokens = prepared("nano")
    assert failed(judge_step(config, weights, tokens)) == []


def test_routes_in_half_precision_are_the_truths(monkeypatch):
    """Even where the reference is wrong, and takes the worst experts."""
    import parity.numpy_model

    best_experts = parity.numpy_model.best_experts
    monkeypatch.setattr(parity.numpy_model, "best_experts", lambda logits, k: best_experts(-logits, k))
    config, weights, _, tokens = prepared("llama", FOUR_EXPERTS)
    scopes = {tensor.scope for tensor in judge_step(config, weights, tokens) if not tensor.passed}
    assert scopes == {"train"}


def test_a_wrong_step_is_named(monkeypatch):
    import torch

    config, weights, _, tokens = prepared("nano")
    adamw = torch.optim.AdamW

    def wrong(params, **options):
        return adamw(params, **{**options, "betas": (0.9, 0.951)})

    monkeypatch.setattr(torch.optim, "AdamW", wrong)
    names = failed(judge_step(config, weights, tokens))
    assert names
    assert all(name.endswith("after a step") for name in names)


def test_a_cache_that_is_a_position_off_is_found(monkeypatch):
    import torch_ref.attention

    config, weights, reference, _ = prepared("llama")
    rotate = torch_ref.attention.POSITION_ENCODINGS["rope"]
    late = lambda x, start, theta: rotate(x, start + (start > 0), theta)  # noqa: E731
    monkeypatch.setitem(torch_ref.attention.POSITION_ENCODINGS, "rope", late)
    pair = BackendPair.build(config, weights)
    assert np.abs(pair.torch.logits(reference.tokens_BT) - reference.logits_BTV).max() < 1e-5
    decoded, _ = judge_decoding(reference, pair.mlx, pair.torch)
    assert failed(decoded) == ["logits one token at a time", "logits in chunks"]


def test_wrong_words_are_counted(monkeypatch):
    import parity.decoding

    config, weights, reference, _ = prepared("llama")
    pair = BackendPair.build(config, weights)
    honest = parity.decoding.generate

    def other(trainer, prompt):
        text = honest(trainer, prompt)
        text[0, -1] = (text[0, -1] + 1) % config.vocab_size
        return text

    monkeypatch.setattr(parity.decoding, "generate", other)
    _, faults = judge_decoding(reference, pair.mlx, pair.torch)
    assert faults == [f"1 of 32 tokens that {name} generated are not the likeliest" for name in ("MLX", "torch")]
