"""Mapping between each family's tensors and ours: one table, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import ModelConfig
from mlx_moe.errors import InputError, brief_name, quoted
from mlx_moe.parameters import LazyWeights, Weights, parameter_table, shapes
from mlx_moe.storage.tensor_files import STORED_DTYPES, StoredTensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granitemoe", "granitemoehybrid", "gpt2")
PREFIXES = {family: "" if family == "gpt2" else "model." for family in FAMILIES}  # as mlx-lm reads them
ALSO_WITH = {"gpt2": "transformer."}  # as transformers writes them
# Derived buffers, recomputed by each reader.
DERIVED = re.compile(r"(.*\.)?(self_attn\.rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias)")

GRANITE = {
    "router": "block_sparse_moe.router.layer",
    "experts.gate_proj": "block_sparse_moe.input_linear",
    "experts.down_proj": "block_sparse_moe.output_linear",
}
# Our names in a mixture; {} is an expert's index. Granite concatenates gate and up projections.
EXPERT_TENSORS = {
    "mixtral": {
        "router": "block_sparse_moe.gate",
        "experts.gate_proj": "block_sparse_moe.experts.{}.w1",
        "experts.up_proj": "block_sparse_moe.experts.{}.w3",
        "experts.down_proj": "block_sparse_moe.experts.{}.w2",
    },
    "qwen3_moe": {
        "router": "mlp.gate",
        "experts.gate_proj": "mlp.experts.{}.gate_proj",
        "experts.up_proj": "mlp.experts.{}.up_proj",
        "experts.down_proj": "mlp.experts.{}.down_proj",
    },
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE
    | {"shared_expert.gate_proj": "shared_mlp.input_linear", "shared_expert.down_proj": "shared_mlp.output_linear"},
}
OWN_TENSOR_EACH = {family for family, names in EXPERT_TENSORS.items() if any("{}" in name for name in names.values())}
GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
GPT2_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class TensorMapping:
    """A tensor of a family, and the tensors of ours that it concatenates along an axis."""

    name: str
    parts: tuple[str, ...]
    expert: int | None = None  # index in a stack of experts, if it holds only that one
    transposed: bool = False  # stored as (in, out); ours are (out, in)
    axis: int = 0

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        whole = list(shapes[self.parts[0]] if self.expert is None else shapes[self.parts[0]][1:])
        whole[self.axis] += sum(shapes[part][self.axis] for part in self.parts[1:])
        return tuple(whole[::-1] if self.transposed else whole)

    def part(self, name: str, whole: NDArray[np.float32], shapes: dict[str, tuple[int, ...]]) -> NDArray[np.float32]:
        """Return our tensor of that name, or its expert's slice, from the family's tensor; a view."""
        start = sum(shapes[part][self.axis] for part in self.parts[: self.parts.index(name)])
        end = start + shapes[name][self.axis if self.expert is None else self.axis + 1]
        along = (slice(None),) * self.axis + (slice(start, end),)
        view: NDArray[np.float32] = (whole.T if self.transposed else whole)[along]
        return view

    def pack(self, weights: Weights) -> NDArray[np.float32]:
        """Return the family's tensor, a view where possible."""
        parts = [weights[part] if self.expert is None else weights[part][self.expert] for part in self.parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)
        return whole.T if self.transposed else whole


def layout(family: str, config: ModelConfig) -> list[TensorMapping]:
    """Return a family's tensors for a model that it can hold, in the order of the forward pass."""
    names = [parameter.name for parameter in parameter_table(config)]
    if family == "gpt2":
        return list(_gpt2(config, names))
    return [holder for name in names for holder in _llama(config, name, family)]


def _llama(config: ModelConfig, name: str, family: str) -> Iterator[TensorMapping]:
    """Yield Llama's tensors: the names equal ours, except routers and experts."""
    prefix = "" if name == "lm_head.weight" else PREFIXES[family]
    block, _, place = name.rpartition("mlp.")
    if config.moe is None or not place.startswith(("router.", "experts.", "shared_expert.")):
        yield TensorMapping(prefix + name, (name,))
        return
    module = place.removesuffix(".weight")
    if module not in EXPERT_TENSORS[family]:  # Granite's up_proj is part of its gate_proj
        return
    theirs = f"{prefix}{block}{EXPERT_TENSORS[family][module]}.weight"
    if "{}" in theirs:
        for expert in range(config.moe.n_experts):
            yield TensorMapping(theirs.format(expert), (name,), expert)
    elif "input_linear" in theirs:
        yield TensorMapping(
            theirs, (name, name.replace("gate_proj", "up_proj")), axis=int(module.startswith("experts."))
        )
    else:
        yield TensorMapping(theirs, (name,))


def _gpt2(config: ModelConfig, names: list[str]) -> Iterator[TensorMapping]:
    """Yield GPT-2's tensors: linear maps are stored as (in, out), with queries, keys and values in one."""
    for name in names:
        module, _, kind = name.rpartition(".")
        if not name.startswith("layers."):
            yield TensorMapping(f"{GPT2_TOP.get(module, module)}.{kind}", (name,))
    for layer in range(config.n_layers):
        for theirs, ours in GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                parts = tuple(f"layers.{layer}.{module}.{kind}" for module in ours)
                is_matrix = kind == "weight" and not theirs.startswith("ln_")
                yield TensorMapping(f"h.{layer}.{theirs}.{kind}", parts, transposed=is_matrix)


def find(
    folder: Path, tensors: dict[str, StoredTensor], family: str, config: ModelConfig
) -> list[tuple[TensorMapping, StoredTensor]]:
    """Return each tensor of the model with its location, by the family's names with and without their prefix.

    Raises InputError for a missing or surplus tensor, a wrong shape, or an unknown dtype.
    """
    expected = shapes(config)
    left, found = dict(tensors), []
    for holder in layout(family, config):
        bare = holder.name.removeprefix(PREFIXES[family])
        spellings = (holder.name, bare, ALSO_WITH.get(family, "") + bare)
        name = next((name for name in spellings if name in left), None)
        if name is None:
            raise InputError(f"{folder}: tensor {holder.name} is missing, which its config asks for")
        stored, shape = left.pop(name), holder.shape(expected)
        if stored.shape != shape:
            raise InputError(f"{folder}: {name} has shape {quoted(stored.shape)}, its config asks for {shape}")
        _check_dtype(folder, name, stored)
        found.append((holder, stored))
    if config.weight_tying and (head := left.pop("lm_head.weight", None)) is not None:
        _check_dtype(folder, "lm_head.weight", head)
        embeddings = next(stored for holder, stored in found if holder.parts == ("embed_tokens.weight",))
        if head.shape != embeddings.shape or not np.array_equal(head.read(), embeddings.read()):
            raise InputError(
                f"{folder}: lm_head.weight is not the embeddings, yet tie_word_embeddings is true; set it to false"
            )
    if surplus := sorted(name for name in left if not DERIVED.fullmatch(name)):
        raise InputError(
            f"{folder}: a {family} model of this config has no tensor {brief_name(surplus[0])} ({len(surplus)} such); "
            "it is another architecture, or config.json is not that of these weights"
        )
    return found


def _check_dtype(folder: Path, name: str, stored: StoredTensor) -> None:
    if not stored.is_readable:
        raise InputError(f"{folder}: {name} holds {stored.dtype}; save it as one of {', '.join(STORED_DTYPES)}")


def unpack(found: list[tuple[TensorMapping, StoredTensor]], config: ModelConfig) -> LazyWeights:
    """Return our tensors by name; views of the file where one holds the same array."""
    expected = shapes(config)
    holders: dict[str, list[tuple[TensorMapping, StoredTensor]]] = {name: [] for name in expected}
    for holder, stored in found:
        for part in holder.parts:
            holders[part].append((holder, stored))

    def read(name: str) -> NDArray[np.float32]:
        first, *others = holders[name]
        if first[0].expert is None:
            return first[0].part(name, first[1].read(), expected)
        experts = np.empty(expected[name], np.float32)
        for holder, stored in (first, *others):
            experts[holder.expert] = holder.part(name, stored.read(), expected)
        return experts

    return LazyWeights(expected, read)
