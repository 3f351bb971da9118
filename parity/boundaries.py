"""Test in float64 what transfers promise: each claim comes with the error that remains.

B batch, T time, D model, N tokens (B·T), E experts, K experts per token, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mlx_moe.config import ModelConfig
from mlx_moe.parameters import Arrays
from mlx_moe.training.backend import Tokens, Trainer
from mlx_moe.transfer.growth import grow_config, layer_sources, plan_growth
from mlx_moe.transfer.moe_layout import segments_of
from mlx_moe.transfer.plan import Plan, TensorPlan, apply_numpy
from parity.gradients import Gradients, loss_and_gradients
from parity.numpy_model import Array, ModuleCall, NumpyModel
from parity.report import TransferClaim

EXACT = 1e-9  # limit in float64, relative to the largest number of the tensor
FORCED_RUNS = 4  # with random experts
PARTS = ("self_attn", "mlp")


def upcycling_claims(plan: Plan, weights: Arrays, tokens_BT1: Tokens, seed: int) -> list[TransferClaim]:
    """Test that any experts compute the dense model, and that the experts' gradients sum to the dense model's.

    Granular experts are drawn as whole copies of the dense FFN.
    """
    dense, upcycled = _in_float64(weights), apply_numpy(plan, _in_float64(weights))
    config, tokens_BT = _without_balance(plan.target_config), tokens_BT1[:, :-1]
    assert config.moe is not None
    expected = NumpyModel(plan.source_config, dense)(tokens_BT).logits_BTV
    model, rng = NumpyModel(config, upcycled), np.random.default_rng(seed)
    parts = segments_of(plan.source_config, config.moe)
    runs = [model(tokens_BT, random_experts(config, tokens_BT, rng, parts)).logits_BTV for _ in range(FORCED_RUNS)]
    _, before = loss_and_gradients(NumpyModel(plan.source_config, dense), tokens_BT1)
    _, after = loss_and_gradients(model, tokens_BT1)
    summed = {name: np.zeros_like(gradient) for name, gradient in before.items()}
    for tensor in plan.tensors:
        if tensor.source is not None:
            summed[tensor.source] += _pulled_back(plan, tensor, after[tensor.target], before[tensor.source].shape)
    return [
        TransferClaim("any experts compute the dense model", max(_relative(run, expected) for run in runs), EXACT),
        _worst("the experts' first gradients sum to the dense model's", summed, before),
    ]


def growth_claims(plan: Plan, weights: Arrays, tokens_BT1: Tokens) -> list[TransferClaim]:
    """Test that the residual stream repeats the old one, layer by layer, and that even copies share its gradients."""
    before, tokens_BT = _in_float64(weights), tokens_BT1[:, :-1]
    config, target = plan.source_config, plan.target_config
    old, found = (
        _residual_streams(each, NumpyModel(each, arrays)(tokens_BT).calls)
        for each, arrays in ((config, before), (target, apply_numpy(plan, before)))
    )
    embedding = next(tensor for tensor in plan.tensors if tensor.target == "embed_tokens.weight")
    sources = [*layer_sources(config.n_layers, target.n_layers), config.n_layers]
    expected = {}
    for layer, source in enumerate(sources):
        is_new = sources.index(source) != layer  # a new block follows the block it copies, and adds nothing
        for part in PARTS if layer < target.n_layers else PARTS[:1]:
            stream = old[source + 1, PARTS[0]] if is_new else old[source, part]
            expected[layer, part] = _repeated(config, embedding, stream)
    return [
        _worst(
            "the grown residual stream is the old one repeated",
            {f"layers.{layer}.{part}": array for (layer, part), array in found.items()},
            {f"layers.{layer}.{part}": array for (layer, part), array in expected.items()},
        ),
        _gradient_claim(config, target, before, tokens_BT1),
    ]


def execution_claim(plan: Plan, weights: Arrays, mlx: Trainer, torch: Trainer) -> TransferClaim:
    """Test that both backends applied the plan bit for bit as NumPy does."""
    expected = apply_numpy(plan, weights)
    wrong = [
        name
        for trainer in (mlx, torch)
        for name, array in trainer.weights().items()
        if not np.array_equal(array.view(np.uint32), expected[name].view(np.uint32))
    ]
    return TransferClaim("MLX and torch apply the plan bit for bit", float(len(wrong)), 0.0, wrong[0] if wrong else "")


def forced_claim(
    dense: Trainer, upcycled: Trainer, tokens_BT: Tokens, limit: float, seed: int, backend: str
) -> TransferClaim:
    """Compare a backend's own logits: the upcycled model with random experts against the dense model."""
    assert upcycled.config.moe is not None
    parts = segments_of(dense.config, upcycled.config.moe)
    experts_LNK = random_experts(upcycled.config, tokens_BT, np.random.default_rng(seed), parts)
    difference = np.abs(upcycled.routed_logits(tokens_BT, experts_LNK).logits_BTV - dense.logits(tokens_BT)).max()
    return TransferClaim(f"any experts compute the dense model, in {backend}", float(difference), limit)


def random_experts(config: ModelConfig, tokens_BT: Tokens, rng: np.random.Generator, parts: int = 1) -> Array:
    """Return different random experts for each token (L, N, K), in groups of `parts` that form one copy."""
    assert config.moe is not None
    shape = (len(config.expert_layers), tokens_BT.size, config.moe.n_experts // parts)
    groups_LNK = rng.random(shape).argsort(axis=-1)[..., : config.moe.top_k // parts]
    return (parts * groups_LNK[..., None] + np.arange(parts)).reshape(*shape[:2], -1)


def _gradient_claim(config: ModelConfig, target: ModelConfig, weights: Gradients, tokens_BT1: Tokens) -> TransferClaim:
    """Test that the first gradients after growth are those that the plan predicts.

    This is exact for even copies, without auxiliary terms, and without pads in a LayerNorm.
    """
    config, target = _without_balance(config), _without_balance(target)
    if config.normalization != "rmsnorm":
        target = grow_config(config, d_model=2 * config.d_model, n_layers=target.n_layers)
    plan = plan_growth(config, target, "even")
    _, before = loss_and_gradients(NumpyModel(config, weights), tokens_BT1)
    _, after = loss_and_gradients(NumpyModel(target, apply_numpy(plan, weights)), tokens_BT1)
    moments = plan.moments(1)
    predicted = apply_numpy(moments, before)
    known = apply_numpy(
        moments, {name: np.ones_like(array) for name, array in before.items()}
    )  # 0 in pads and new blocks
    found = {name: np.where(known[name] == 0, 0, after[name]) for name in after}
    return _worst("first gradients are as the plan predicts", found, predicted)


def _residual_streams(config: ModelConfig, calls: Mapping[str, ModuleCall]) -> dict[tuple[int, str], Array]:
    """Return the residual stream before each sublayer, by layer and name; after the last block as one more layer."""
    norms = dict(zip(PARTS, ("input_layernorm", "post_attention_layernorm"), strict=True))
    streams = {
        (layer, part): calls[f"layers.{layer}.{norms[part] if config.norm_position == 'pre' else part}"].inputs[0]
        for layer in range(config.n_layers)
        for part in PARTS
    }
    return streams | {(config.n_layers, PARTS[0]): calls["norm"].inputs[0]}


def _repeated(config: ModelConfig, embedding: TensorPlan, stream_BTD: Array) -> Array:
    """Return the stream repeated as the grown embeddings repeat it, pads included."""
    plan = Plan(config, config, (replace(embedding, source="x"),))
    rows = apply_numpy(plan, {"x": stream_BTD.reshape(-1, stream_BTD.shape[-1])})[embedding.target]
    return rows.reshape(*stream_BTD.shape[:-1], -1)


def _pulled_back(plan: Plan, tensor: TensorPlan, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return what a target tensor's gradient contributes to its source's gradient, by the chain rule."""
    alone = replace(plan, tensors=(replace(tensor, source="x"),))
    unscaled = replace(tensor, source="x", maps=tuple(replace(axis_map, scale=None) for axis_map in tensor.maps))
    numbered = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    places = apply_numpy(replace(plan, tensors=(unscaled,)), {"x": numbered})
    scales = apply_numpy(alone, {"x": np.ones(shape)})[tensor.target]
    summed = np.zeros(shape)
    np.add.at(summed.reshape(-1), places[tensor.target].astype(int), scales * gradient)
    return summed


def _in_float64(weights: Arrays) -> Gradients:
    return {name: array.astype(np.float64) for name, array in weights.items()}


def _without_balance(config: ModelConfig) -> ModelConfig:
    """Return the config without auxiliary losses, so that its loss is the cross entropy alone."""
    assert config.moe is not None
    plain = config.moe.model_copy(update={"load_balance_coefficient": 0.0, "z_loss_coefficient": 0.0})
    return config.model_copy(update={"moe": plain})


def _worst(name: str, found: Gradients, expected: Gradients) -> TransferClaim:
    errors = {part: _relative(found[part], expected[part]) for part in expected}
    worst = max(errors, key=lambda part: errors[part])
    return TransferClaim(name, errors[worst], EXACT, worst)


def _relative(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return np.inf
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3))
