"""Known faults to put into PyTorch's side: the self-test must find all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mlx_moe.config import ModelConfig, RopeScaling
from mlx_moe.parameters import Arrays
from parity.small_models import FOUR_EXPERTS, probe_model

Tensor = Any  # of PyTorch, which this package does not import
Edit = Callable[[Arrays], Mapping[str, Any]]
Patch = tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]]]  # module, name or name[key], new from old


# Presets with options that no preset has.
SCALING = RopeScaling(factor=8.0, original_context_length=32)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, more": ("llama", {"qk_norm": True, "attention_bias": "qkvo", "rope_scaling": SCALING.model_dump()})
}


@dataclass(frozen=True)
class Mutation:
    """A fault in PyTorch's copy of a model: in its config, its weights, or a function of the backend.

    `shows_in` names the part of the comparison that must find it.
    """

    name: str
    architecture: str  # a preset, or a key of VARIANTS; + for experts
    fields: Mapping[str, Any] = field(default_factory=dict)
    weights: Edit | None = None
    patch: Patch | None = None
    shows_in: Literal["module", "decode", "train"] = "module"


def faultless(architecture: str, seed: int) -> tuple[ModelConfig, Arrays]:
    """Return the small model that a mutation's `architecture` names, without the fault."""
    name = architecture.rstrip("+")
    preset, fields = VARIANTS.get(name, (name, {}))
    return probe_model(preset, seed, FOUR_EXPERTS if architecture.endswith("+") else None, **fields)


def _through(dtype: str) -> Callable[[Any], Any]:
    """Return a function that rounds to half precision and back."""

    def rounded(array: Any) -> Any:
        if dtype == "fp16":
            return array.astype(np.float16).astype(np.float32)
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    return rounded


def _edit(name: str, change: Callable[[Any], Any]) -> Edit:
    """Return an edit of one tensor."""
    return lambda weights: {name: np.ascontiguousarray(change(weights[name]))}


def _swap(left: str, right: str) -> Edit:
    """Return an edit that swaps two groups of tensors, named by the part of the name that differs."""
    return lambda weights: (
        {name: weights[name.replace(left, right)] for name in weights if left in name}
        | {name: weights[name.replace(right, left)] for name in weights if right in name}
    )


def _of_heads(change: Callable[[Any], Any], head_dim: int = 12) -> Callable[[Any], Any]:
    """Return a function that applies `change` to a matrix viewed as (heads, head_dim, D)."""
    return lambda array: change(array.reshape(-1, head_dim, array.shape[-1])).reshape(array.shape)


def _sees_the_next(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def leaking(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor) -> Tensor:
        out_BHTd = q_BHTd.clone()
        out_BHTd[:, :, :-1] = attend(
            q_BHTd[:, :, :-1], k_BGSd, v_BGSd
        )  # with fewer queries than keys, queries count from the end
        out_BHTd[:, :, -1:] = attend(q_BHTd[:, :, -1:], k_BGSd, v_BGSd)
        return out_BHTd

    return leaking


def _with_ε(ε: float) -> Callable[[Any], Callable[..., Tensor]]:
    """Return a patch of the RMSNorm of queries and keys."""
    return lambda _: lambda norm, x: x * (x.square().mean(-1, keepdim=True) + ε).rsqrt() * norm.weight


def _scaling(**fields: Any) -> RopeScaling:
    return SCALING.model_copy(update=fields)


def _attention_scale(size: float) -> Mutation:
    patch = ("torch_ref.attention", "ATTENTION_BACKENDS[sdpa]", lambda old: lambda q, k, v: old(q * (1 + size), k, v))
    return Mutation(f"attention scale off by {size:g}", "llama", patch=patch)


def _theta(size: float) -> Mutation:
    return Mutation(f"RoPE θ 10,000 -> {10_000 * (1 + size):,.6g}", "llama", {"rope_theta": 10_000 * (1 + size)})


def _matrix(size: float) -> Mutation:
    name = "layers.1.mlp.down_proj.weight"
    return Mutation(f"a matrix off by {size:g}", "llama", weights=_edit(name, lambda w: w * np.float32(1 + size)))


def _epsilon(size: float) -> Mutation:
    return Mutation(f"norm ε off by {size:g} of itself", "llama", {"norm_eps": 1e-6 * (1 + size)})


def _residual(size: float) -> Mutation:
    def scaled(old: Callable[..., Any]) -> Callable[..., Any]:
        return lambda block, x, experts: tuple(
            y * (1 + size) if i == 0 else y for i, y in enumerate(old(block, x, experts))
        )

    patch = ("torch_ref.transformer", "Block._feed_forward", scaled)
    return Mutation(f"FFN added {size:g} too large", "hybrid", patch=patch)


# Faults of a given size, relative to the number they change.
SIZED: dict[str, Callable[[float], Mutation]] = {
    "attention scale": _attention_scale,
    "RoPE θ": _theta,
    "norm ε": _epsilon,
    "one matrix": _matrix,
    "one addition to the residual stream": _residual,
}

_MOE, _ATTENTION, _STEP = "torch_ref.moe", "torch_ref.attention", "torch_ref.step"
MUTATIONS: Sequence[Mutation] = (
    Mutation("norm ε 1e-6 -> 1e-8", "llama", {"norm_eps": 1e-8}),
    _theta(1e-5),
    Mutation("one matrix through fp16", "llama", weights=_edit("layers.1.mlp.down_proj.weight", _through("fp16"))),
    Mutation(
        "one norm weight through bf16", "llama", weights=_edit("layers.0.input_layernorm.weight", _through("bf16"))
    ),
    Mutation("head through bf16", "llama", weights=_edit("lm_head.weight", _through("bf16"))),
    Mutation("one embedding through fp16", "gpt2", weights=_edit("embed_positions.weight", _through("fp16"))),
    _attention_scale(1e-3),
    Mutation("attention sees the next token", "llama", patch=(_ATTENTION, "ATTENTION_BACKENDS[sdpa]", _sees_the_next)),
    Mutation(
        "values through bf16",
        "simple",
        patch=(_ATTENTION, "ATTENTION_BACKENDS[sdpa]", lambda old: lambda q, k, v: old(q, k, v.bfloat16().float())),
    ),
    Mutation(
        "RoPE one position late for keys",
        "smollm",
        patch=(_ATTENTION, "POSITION_ENCODINGS[rope]", lambda old: lambda x, at, θ: old(x, at + (x.shape[1] == 2), θ)),
    ),
    Mutation(
        "RoPE pairs neighbours, not halves",
        "llama",
        weights=lambda weights: {
            name: _of_heads(lambda w: w.reshape(-1, 2, 6, w.shape[-1]).swapaxes(1, 2).copy())(weights[name])
            for name in weights
            if name.endswith(("q_proj.weight", "k_proj.weight"))
        },
    ),
    Mutation("no positions", "llama", {"position_encoding": "none"}),
    Mutation(
        "learned positions off by one",
        "gpt2",
        weights=_edit("embed_positions.weight", lambda w: np.roll(w, 1, axis=0)),
    ),
    Mutation(
        "query heads in reverse",
        "llama",
        weights=_edit("layers.0.self_attn.q_proj.weight", _of_heads(lambda w: w[::-1])),
    ),
    Mutation(
        "query heads spread over the key groups",
        "smollm",
        patch=(
            _ATTENTION,
            "ATTENTION_BACKENDS[sdpa]",
            lambda old: lambda q, k, v: old(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)),
        ),
    ),
    Mutation("a dropped bias", "gpt2", weights=_edit("layers.1.self_attn.o_proj.bias", lambda b: b * 0)),
    Mutation("a dropped key bias", "gpt2", weights=_edit("layers.1.self_attn.k_proj.bias", lambda b: b * 0)),
    Mutation(
        "queries and keys not normalized", "llama, more", patch=(_ATTENTION, "_normalized", lambda _: lambda _, x: x)
    ),
    Mutation(
        "ε of queries' and keys' norms 1e-6 -> 1e-5", "llama, more", patch=(_ATTENTION, "_normalized", _with_ε(1e-5))
    ),
    Mutation("RoPE not scaled", "llama, more", {"rope_scaling": None}),
    Mutation("RoPE slowed 8.001 times, not 8", "llama, more", {"rope_scaling": _scaling(factor=8.001)}),
    Mutation("RoPE scaled from another context", "llama, more", {"rope_scaling": _scaling(original_context_length=33)}),
    Mutation(
        "an output bias of attention dropped",
        "llama, more",
        weights=_edit("layers.1.self_attn.o_proj.bias", lambda b: b * 0),
    ),
    Mutation(
        "a query bias through bf16", "llama, more", weights=_edit("layers.0.self_attn.q_proj.bias", _through("bf16"))
    ),
    Mutation("GELU by tanh, not erf", "simple", {"activation": "gelu_tanh"}),
    Mutation("GELU by erf, not tanh", "gpt2", {"activation": "gelu"}),
    Mutation("GELU in place of SiLU", "llama", {"activation": "gelu"}),
    Mutation("gate and up swapped", "llama", weights=_swap("gate_proj", "up_proj")),
    Mutation("RMSNorm takes the mean away", "llama", {"normalization": "layernorm_nobias"}),
    Mutation("norms after, not before", "hybrid", {"norm_position": "post"}),
    Mutation("layers swapped", "nano", weights=_swap("layers.0.", "layers.1.")),
    _residual(1e-3),
    Mutation(
        "experts swapped",
        "llama+",
        weights=lambda weights: {name: weights[name][[1, 0, 2, 3]] for name in weights if ".experts." in name},
    ),
    Mutation(
        "an expert's bias dropped",
        "gpt2+",
        weights=_edit("layers.1.mlp.experts.up_proj.bias", lambda b: b * np.array([[1], [1], [1], [0]], np.float32)),
    ),
    Mutation("router through bf16", "llama+", weights=_edit("layers.0.mlp.router.weight", _through("bf16"))),
    Mutation(
        "gates not renormalised",
        "llama+",
        patch=(_MOE, "gate_weights", lambda old: lambda logits, experts: logits.softmax(-1).gather(-1, experts)),
    ),
    Mutation(
        "gates of equal weight",
        "llama+",
        patch=(_MOE, "gate_weights", lambda old: lambda logits, experts: old(logits * 0, experts)),
    ),
    Mutation(
        "ties to the higher expert",
        "llama+",
        patch=(_MOE, "choose_experts", lambda old: lambda logits, k: logits.shape[-1] - 1 - old(logits.flip(-1), k)),
    ),
    Mutation(
        "RoPE one position late with a cache",
        "llama",
        patch=(_ATTENTION, "POSITION_ENCODINGS[rope]", lambda old: lambda x, at, θ: old(x, at + (at > 0), θ)),
        shows_in="decode",
    ),
    Mutation(
        "gates without a gradient",
        "llama+",
        patch=(_MOE, "gate_weights", lambda old: lambda logits, experts: old(logits, experts).detach()),
        shows_in="train",
    ),
    Mutation(
        "balance coefficient 0.1 % too large",
        "llama+",
        patch=(_STEP, "auxiliary_loss", lambda old: lambda routing, load, moe: old(routing, 1.001 * load, moe)),
        shows_in="train",
    ),
    Mutation(
        "AdamW β₂ 0.95 -> 0.951",
        "llama",
        patch=("torch.optim", "AdamW", lambda old: lambda groups, **of: old(groups, **(of | {"betas": (0.9, 0.951)}))),
        shows_in="train",
    ),
    Mutation("one expert too few", "llama+", {"moe": FOUR_EXPERTS.model_copy(update={"top_k": 1})}),
    Mutation(
        "the second and third expert",
        "llama+",
        patch=(_MOE, "choose_experts", lambda old: lambda logits, k: old(logits, k + 1)[:, 1:]),
    ),
)
