"""Export of a checkpoint as a model folder that transformers and mlx-lm open unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlx_moe.accounting import count_parameters
from mlx_moe.config import ModelConfig
from mlx_moe.data.tokenizers import HUB_NAME, Tokenizer
from mlx_moe.errors import InputError
from mlx_moe.hub import formats
from mlx_moe.hub.foreign import refuse_code
from mlx_moe.hub.layout import find, layout, unpack
from mlx_moe.hub.models import ORIGIN, with_finite_weights
from mlx_moe.hub.read_config import read_config
from mlx_moe.hub.sizes import check_room
from mlx_moe.parameters import LazyWeights, shapes
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.storage.reading import read_mapping
from mlx_moe.storage.tensor_files import SHARD_BYTES, open_tensors, write_tensors
from mlx_moe.storage.tokenizer_files import copy_tokenizer
from mlx_moe.terminal import plain_markdown
from mlx_moe.transfer.registry import TRANSFERS


def export(source: Checkpoint, out: Path, requested: str, shard_bytes: int = SHARD_BYTES) -> str:
    """Write `out` in a format, atomically, as `fill` does. Returns the format."""
    with creating(out) as partial:
        return fill(source, partial, requested, shard_bytes=shard_bytes)


def fill(
    source: Checkpoint,
    folder: Path,
    requested: str,
    check: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model into an empty folder in a format, `auto` for a suitable one, and return the format.

    The result is read back and must equal the model bit for bit; `check` may inspect it too, and raise. Raises
    InputError if no format fits, the weights hold NaN or Inf, or the disk refuses.
    """
    name = formats.choose_format(source.config, requested)
    check_room(folder, source.config)
    source = with_finite_weights(_normalized_for_format(source, name))
    holders = {holder.name: holder for holder in layout(name, source.config)}
    special_tokens = _write_tokenizer(source, folder)
    _write_json(formats.to_json(source.config, name, special_tokens), folder / "config.json")
    (folder / "README.md").write_text(_card(source, name), encoding="utf-8")
    theirs = {name: holder.shape(shapes(source.config)) for name, holder in holders.items()}
    # several of their tensors are slices of one of our expert tensors
    weights = LazyWeights(source.weights, lru_cache(1)(source.weights.__getitem__))
    write_tensors(folder, theirs, lambda name: [holders[name].pack(weights)], shard_bytes)
    _read_back(source, name, folder)
    if check is not None:
        check(folder)
    return name


def _normalized_for_format(source: Checkpoint, name: str) -> Checkpoint:
    """Return the model with the config and tensors of a format; tensors that only the format has are zeros."""
    config = formats.normalize_for_format(source.config, name)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes(config).items() if name not in source.weights}
    names = [*source.weights, *zeros]
    weights = LazyWeights(names, lambda name: zeros[name] if name in zeros else source.weights[name])
    return replace(source, config=config, weights=weights)


def _read_back(source: Checkpoint, name: str, folder: Path) -> None:
    tensors = open_tensors(folder)
    family, config = read_config(folder, tensors)
    # These fields do not affect the logits, so the folder does not contain them.
    training: dict[str, Any] = dict.fromkeys(("architecture", "dropout", "attention_backend"), True)
    training["moe"] = {"load_balance_coefficient", "z_loss_coefficient"}
    ours, theirs = (model.model_dump(exclude=training) for model in (source.config, config))
    if ours != theirs:
        raise InputError(f"{name} does not hold {source.path} as it is: {ours} became {theirs}; nothing was kept")
    for tensor, array in unpack(find(folder, tensors, family, config), config).items():
        if not np.array_equal(array, source.weights[tensor]):
            raise InputError(f"{tensor} came back from {folder} changed; the disk may be faulty; nothing was kept")


def _write_tokenizer(source: Checkpoint, folder: Path) -> dict[str, int | None]:
    """Copy the tokenizer, write generation_config.json if it has none, and return the ids of special tokens."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if source.tokenizer_folder is not None:
        refuse_code(source.tokenizer_folder)  # users would be asked to run it
        ids["eos_token_id"] = Tokenizer.load(source.tokenizer_folder).eot_id
        copy_tokenizer(source.tokenizer_folder, folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        values = read_mapping(generation)
        return {key: values.get(key, ids.get(key)) for key in (*ids, "pad_token_id")}
    _write_json(ids, generation)
    return ids


def _card(source: Checkpoint, name: str) -> str:
    """Return README.md, with names from outside escaped for YAML, Markdown and HTML."""
    config, count, state = source.config, count_parameters(source.config), source.state
    active = f", {count.active:,} of them for each token" if config.moe else ""
    made = "imported from Hugging Face's format"
    if state.backend != ORIGIN:
        begun = _began(source)
        trained = f"trained for {state.step:,} steps, by the {state.backend} backend"
        made = f"by its lineage, then {trained}" if state.lineage else f"{begun}, then {trained}"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if state.lineage and HUB_NAME.fullmatch(state.lineage[0]) and "/" in state.lineage[0]:
        front["base_model"] = state.lineage[0]
    rows = {
        "architecture": f"{config.display_name}, in the format {name}",
        "parameters": f"{count.total:,}{active}",
        "experts": _experts(config) if config.moe else None,
        "context": f"{config.context_length:,} tokens",
        "source checkpoint": source.path.resolve().name,
        "made": made,
        "lineage": ", ".join(state.lineage) or None,
        "validation loss": None if state.validation_loss is None else f"{state.validation_loss:.4f} nats per token",
        "exported": f"with mlxmoe {version('mlxmoe')}, float32",
    }
    table = "\n".join(f"| {key} | {plain_markdown(value)} |" for key, value in rows.items() if value is not None)
    return f"""---
{yaml.safe_dump(front | {"tags": ["mlx", "mlxmoe"]}, sort_keys=False)}---

# {config.display_name}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH")
```

```python
from mlx_lm import load
model, tokenizer = load("PATH")
```
"""


def _began(source: Checkpoint) -> str:
    """Describe the model at the start of its last phase."""
    transfer = TRANSFERS.get(source.state.transfer or "")
    if transfer is not None:
        return f"{transfer.participle}{' to experts' if transfer.gives_experts else ''}"
    return "experts from scratch" if source.config.moe else "dense"


def _experts(config: ModelConfig) -> str:
    assert config.moe is not None
    layers = len(config.expert_layers)
    where = "per layer" if layers == config.n_layers else f"in each of {layers} of {config.n_layers} layers"
    shared = ", and a shared one" if config.moe.shared_d_ff else ""
    return f"{config.moe.n_experts} {where}, {config.moe.top_k} per token{shared}"


def _write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
