"""All tensors of a model: name, shape, meaning of each axis, initialisation.

This one table defines both backends' initial weights, the optimizers' groups and state, parameter counts, checks on
checkpoints, and the plans of `transfer`. The names are the contract between the backends and with every safetensors
file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import LoRAConfig, ModelConfig, OptimizerConfig
from mlx_moe.errors import InputError

Arrays = dict[str, NDArray[np.float32]]
Weights = Mapping[str, NDArray[np.float32]]  # in memory, or read lazily from a file


class LazyWeights(Mapping[str, NDArray[np.float32]]):
    """Arrays that are read or computed anew on each access, and not cached."""

    def __init__(self, names: Iterable[str], read: Callable[[str], NDArray[np.float32]]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Axis(Enum):
    """Meaning of a tensor's axis, and whether the tensor reads or writes it."""

    VOCAB = "vocab"
    POSITION = "position"
    EXPERT = "expert"
    RESIDUAL_WRITE = "residual, written"
    RESIDUAL_READ = "residual, read"
    NORM = "residual, normalised"
    Q_HEADS_WRITE = "query heads, written"
    KV_HEADS_WRITE = "key-value heads, written"
    Q_HEADS_READ = "query heads, read"
    HEAD_NORM = "one head, normalised"
    FFN_WRITE = "FFN neurons, written"
    FFN_READ = "FFN neurons, read"
    RANK = "rank of an adapter"


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    start: Literal["normal", "residual", "ones", "zeros"]
    is_trained: bool = True

    @property
    def is_matrix(self) -> bool:
        """True if it multiplies activations or holds embeddings; weight decay applies to these."""
        return self.start in ("normal", "residual") or Axis.RANK in self.axes

    @property
    def is_hidden_matrix(self) -> bool:
        """True if it maps activations to activations inside a block, or is a stack of such matrices, one per expert.

        The router does not count: like `lm_head` it is E probes side by side, read by a softmax. Orthogonalised, all of
        them would move equally far in every step, even those of experts that hardly any token chose. Nor do adapters: B
        starts at 0, and an orthogonal update moves all of it at once.
        """
        return self.is_matrix and not {Axis.VOCAB, Axis.POSITION, Axis.EXPERT, Axis.RANK} & set(self.axes[-2:])


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters updated by the same rule."""

    rule: Literal["muon", "adamw"]
    weight_decay: float
    names: list[str]


# Moments kept per parameter: the mean of its gradients (m), and of their squares (v).
MOMENTS = {"muon": ("m",), "adamw": ("m", "v")}


def parameter_table(config: ModelConfig) -> list[Parameter]:
    """Return all parameters of a model, in the order of the forward pass."""
    if config.lora is None:
        return list(_table(config))
    return [row for parameter in _table(config) for row in _adapted(parameter, config.lora)]


def layer_of(name: str) -> int | None:
    """Return the index of the layer of a parameter or module; None outside the blocks."""
    place, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if place == "layers" else None


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by name, in the order of the table."""
    return {parameter.name: parameter.shape for parameter in parameter_table(config)}


def initialize(config: ModelConfig, seed: int) -> Arrays:
    """Initial weights, the same for every backend: a pure function of (config, seed).

    ==========================  =============================================
    embeddings, projections     normal, std `init_std`
    o_proj, down_proj           normal, std `init_std` / √(2 · n_layers) (GPT-2)
    norm weights                1
    all biases                  0
    adapters: A; B              normal, std `init_std`; 0
    ==========================  =============================================
    """
    return {parameter.name: _start(parameter, config, seed) for parameter in parameter_table(config)}


def start_adapters(config: ModelConfig, seed: int) -> Arrays:
    """Return the adapters' part of `initialize`; adding them does not change the model's output."""
    return {p.name: _start(p, config, seed) for p in parameter_table(config) if Axis.RANK in p.axes}


def merge_lora(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Return the model without adapters, W + alpha/rank · B·A, summed in float64 and rounded once, lazily."""
    if config.lora is None:
        return config, weights
    plain, scale = config.model_copy(update={"lora": None}), config.lora.alpha / config.lora.rank

    def read(name: str) -> NDArray[np.float32]:
        module = name.removesuffix(".weight")
        if f"{module}.lora_a" not in weights:
            return weights[name]
        a, b = (weights[f"{module}.lora_{which}"].astype(np.float64) for which in "ab")
        return (weights[name] + scale * (b @ a)).astype(np.float32)

    return plain, LazyWeights(shapes(plain), read)


def _start(parameter: Parameter, config: ModelConfig, seed: int) -> NDArray[np.float32]:
    std = {"normal": config.init_std, "residual": config.init_std / (2 * config.n_layers) ** 0.5}
    if parameter.start in std:
        return normal(parameter.name, seed, parameter.shape) * np.float32(std[parameter.start])
    return np.full(parameter.shape, parameter.start == "ones", dtype=np.float32)


def normal(name: str, seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal float32 numbers that depend only on (name, seed, shape): a Philox stream per tensor."""
    generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, dtype=np.float32)


def optimizer_groups(config: ModelConfig, optimizer: OptimizerConfig) -> list[OptimizerGroup]:
    """Group the trained parameters: hidden matrices for Muon if chosen, all others for AdamW; only matrices decay.

    Frozen parameters are in no group.
    """
    trained = [p for p in parameter_table(config) if p.is_trained]
    chosen = {p.name for p in trained if p.is_hidden_matrix} if optimizer.name == "muon" else set()
    matrices = [p.name for p in trained if p.is_matrix]
    groups = [
        OptimizerGroup("muon", optimizer.weight_decay, [name for name in matrices if name in chosen]),
        OptimizerGroup("adamw", optimizer.weight_decay, [name for name in matrices if name not in chosen]),
        OptimizerGroup("adamw", 0.0, [p.name for p in trained if not p.is_matrix]),
    ]
    return [group for group in groups if group.names]


def optimizer_table(config: ModelConfig, optimizer: OptimizerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an optimizer's state: `m.{name}`, `v.{name}`, and `step`, the number of steps taken."""
    rules = {name: group.rule for group in optimizer_groups(config, optimizer) for name in group.names}
    trained = [p for p in parameter_table(config) if p.is_trained]
    moments = {f"{moment}.{p.name}": p.shape for p in trained for moment in MOMENTS[rules[p.name]]}
    return {"step": ()} | moments


def check_optimizer_state(config: ModelConfig, optimizer: OptimizerConfig, state: Arrays) -> None:
    """Raise InputError unless `state` holds exactly what this optimizer keeps for this model."""
    expected = optimizer_table(config, optimizer)
    remedy = "take the optimizer and the model that wrote it"
    for name, shape in expected.items():
        if name not in state:
            raise InputError(f"optimizer state: no {name}, which optimizer.name {optimizer.name} needs; {remedy}")
        if state[name].shape != shape:
            raise InputError(f"optimizer state: {name} has shape {state[name].shape}, not {shape}; {remedy}")
    if extra := sorted(state.keys() - expected.keys()):
        raise InputError(
            f"optimizer state: {extra[0]} ({len(extra)} such) is nothing that optimizer.name {optimizer.name} keeps; "
            f"{remedy}"
        )


def _adapted(parameter: Parameter, lora: LoRAConfig) -> Iterator[Parameter]:
    """Yield the parameter, frozen unless a router; after a target's weight, its adapters A (r, in) and B (out, r)."""
    module, _, kind = parameter.name.rpartition(".")
    projection = module.rpartition(".")[2]
    yield replace(parameter, is_trained=projection == "router" and lora.router)
    if kind == "weight" and projection in lora.targets:
        (*experts, n_out, n_in), (*leading, write, read) = parameter.shape, parameter.axes
        yield Parameter(f"{module}.lora_a", (*experts, lora.rank, n_in), (*leading, Axis.RANK, read), "normal")
        yield Parameter(f"{module}.lora_b", (*experts, n_out, lora.rank), (*leading, write, Axis.RANK), "zeros")


def _table(config: ModelConfig) -> Iterator[Parameter]:
    D, V = config.d_model, config.vocab_size
    yield Parameter("embed_tokens.weight", (V, D), (Axis.VOCAB, Axis.RESIDUAL_WRITE), "normal")
    if config.position_encoding == "learned_absolute":
        shape = (config.context_length, D)
        yield Parameter("embed_positions.weight", shape, (Axis.POSITION, Axis.RESIDUAL_WRITE), "normal")
    with_experts = set(config.expert_layers)
    for layer in range(config.n_layers):
        yield from _block(config, f"layers.{layer}.", layer in with_experts)
    yield from _norm(config, "norm")
    if not config.weight_tying:
        yield Parameter("lm_head.weight", (V, D), (Axis.VOCAB, Axis.RESIDUAL_READ), "normal")


def _block(config: ModelConfig, prefix: str, has_experts: bool) -> Iterator[Parameter]:
    D = config.d_model
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield from _norm(config, f"{prefix}input_layernorm")
    attention = f"{prefix}self_attn."
    qkv_bias, o_bias = config.attention_bias != "none", config.attention_bias == "qkvo"
    axes = (Axis.Q_HEADS_WRITE, Axis.RESIDUAL_READ)
    yield from _linear(f"{attention}q_proj", (q_width, D), axes, qkv_bias)
    for projection in ("k_proj", "v_proj"):
        axes = (Axis.KV_HEADS_WRITE, Axis.RESIDUAL_READ)
        yield from _linear(f"{attention}{projection}", (kv_width, D), axes, qkv_bias)
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield Parameter(f"{attention}{norm}.weight", (config.head_dim,), (Axis.HEAD_NORM,), "ones")
    yield from _linear(f"{attention}o_proj", (D, q_width), (Axis.RESIDUAL_WRITE, Axis.Q_HEADS_READ), o_bias)
    yield from _norm(config, f"{prefix}post_attention_layernorm")
    mlp = f"{prefix}mlp."
    if config.moe is None or not has_experts:
        yield from _ffn(config, mlp, config.d_ff)
        return
    experts = (config.moe.n_experts,)
    yield Parameter(f"{mlp}router.weight", (*experts, D), (Axis.EXPERT, Axis.RESIDUAL_READ), "normal")
    yield from _ffn(config, f"{mlp}experts.", config.expert_d_ff, experts)
    if config.moe.shared_d_ff:
        yield from _ffn(config, f"{mlp}shared_expert.", config.moe.shared_d_ff)


def _ffn(config: ModelConfig, prefix: str, F: int, experts: tuple[int, ...] = ()) -> Iterator[Parameter]:
    D = config.d_model
    for projection in FFN_INPUTS[config.ffn_type]:
        axes = (Axis.FFN_WRITE, Axis.RESIDUAL_READ)
        yield from _linear(f"{prefix}{projection}", (F, D), axes, config.bias, experts)
    yield from _linear(f"{prefix}down_proj", (D, F), (Axis.RESIDUAL_WRITE, Axis.FFN_READ), config.bias, experts)


NORMS_WITH_BIAS = {"layernorm"}

# Projections from the residual stream into each type of FFN; `down_proj` leads back in all of them.
FFN_INPUTS = {"standard": ("up_proj",), "swiglu": ("gate_proj", "up_proj")}


def _norm(config: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (config.d_model,), (Axis.NORM,), "ones")
    if config.normalization in NORMS_WITH_BIAS:
        yield Parameter(f"{name}.bias", (config.d_model,), (Axis.NORM,), "zeros")


def _linear(
    name: str,
    shape: tuple[int, int],
    axes: tuple[Axis, Axis],
    bias: bool,
    experts: tuple[int, ...] = (),
) -> Iterator[Parameter]:
    leading = (Axis.EXPERT,) * len(experts)
    start: Literal["normal", "residual"] = "residual" if axes[0] is Axis.RESIDUAL_WRITE else "normal"
    yield Parameter(f"{name}.weight", experts + shape, leading + axes, start)
    if bias:
        yield Parameter(f"{name}.bias", experts + shape[:1], leading + axes[:1], "zeros")
