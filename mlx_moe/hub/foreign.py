"""Safe opening of third-party models by other libraries.

transformers and mlx-lm run code that a model's folder names or contains: `auto_map` and `model_file` in config.json, a
kernel as its attention, adapters and pickles beside the weights, `custom_generate/`. So they never see the folder
itself, only a folder with a checked copy of its config.json and links to its safetensors files.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_moe.errors import InputError, brief_name, quoted
from mlx_moe.storage.reading import own_file, read_mapping
from mlx_moe.storage.tensor_files import INDEX, StoredTensor, check_finite, n_elements, open_tensors

CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of PEFT
# Files that may name code for some library.
SETTINGS = (CONFIG, "tokenizer_config.json", "generation_config.json", "processor_config.json")
NO_CODE = "the model brings code of its own, which is never run"
NO_QUANTIZED = "quantised weights are not read; take the model in float32, bfloat16 or float16"
ONE_FILE = "only config.json and model.safetensors are read; delete the key"
# Keys at any depth of the files above. Empty values name nothing.
CODE = {
    **dict.fromkeys(("auto_map", "model_file", "custom_pipelines", "custom_generate", "trust_remote_code"), NO_CODE),
    **dict.fromkeys(("configuration_files", "transformers_weights"), ONE_FILE),
}
# A hub name in place of a built-in name is a kernel, which libraries download and run.
COMPUTED_BY = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
QUANTIZED = ("quantization_config", "quantization")
# How and where to compute, and the model's origin: libraries should not act on these.
LEFT_OUT = {
    *(*CODE, *COMPUTED_BY, "_attn_implementation_autoset", "name_or_path", "_name_or_path", "_commit_hash"),
    *("use_kernels", "kernel_config", "fusion_config", "distributed_config"),
    *("base_model_tp_plan", "base_model_ep_plan", "base_model_pp_plan", "tp_plan", "tp_size", "device_map"),
}
FAMILY = re.compile(r"[A-Za-z0-9_-]{1,100}")
COUNTS_LAYERS = re.compile(r"(n|num|decoder|encoder)(_\w+)?_layers?")
NO_SIZE = re.compile(r".*(_id|_ids|theta|seed|base)")  # integers that determine no array's size
LARGEST_SIZE = 1 << 24  # of sizes that no tensor shows, such as positions; the longest published context is 10 million
SPARE_ELEMENTS = 50_000_000  # that a library may allocate beyond the files' contents, such as position tables


@dataclass(frozen=True)
class ForeignModel:
    """A model in the folder prepared for libraries: its config.json as they read it, and the tensors of its files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def source(self) -> Path:
        """The original config.json."""
        return self.files[0].with_name(CONFIG)

    @property
    def files(self) -> list[Path]:
        """The original files of its weights."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the keys of config.json.

    Raises InputError if there is none, if a file of the folder names code to run, or if it is an adapter.
    """
    found = refuse_code(folder)
    if (folder / ADAPTER).is_file():
        raise InputError(f"{folder} holds an adapter ({ADAPTER}); merge it into its model first (merge_and_unload)")
    if found is None:
        raise InputError(f"no {CONFIG} in {folder}; name the folder of a model")
    return found


def refuse_code(folder: Path) -> dict[str, Any] | None:
    """Raise InputError if a file of a folder names code to run; return the keys of config.json, if any."""
    found: dict[str, Any] | None = None
    for name in SETTINGS:
        if (file := own_file(folder, name)) is not None:
            values = read_mapping(file)
            for place, key, value in _every_key(values):
                if key in CODE and value:
                    raise InputError(f"{file}: {brief_name(place)} = {quoted(value)} cannot be honoured; {CODE[key]}")
                if key in COMPUTED_BY and not _is_plain(value):
                    raise InputError(f"{file}: {brief_name(place)} = {quoted(value)} cannot be honoured; {NO_CODE}")
            found = values if name == CONFIG else found
    return found


@contextlib.contextmanager
def opened_for_library(folder: Path) -> Iterator[ForeignModel]:
    """Yield a model for another library to open, in a folder with its config.json and weights only.

    The folder is deleted at the end; files opened in it stay open. Raises InputError if the model names code to run,
    claims impossible sizes, or is damaged.
    """
    values, file = read_settings(folder), folder / CONFIG
    family = values.get("model_type")
    if not isinstance(family, str) or not FAMILY.fullmatch(family):
        raise InputError(f"{file}: model_type = {quoted(family)} is no family of models; correct it")
    tensors = open_tensors(folder)
    _check_config(values, file, tensors)
    with tempfile.TemporaryDirectory(prefix="mlxmoe-") as name, without_network():
        model = ForeignModel(Path(name), _without(values, LEFT_OUT), tensors)
        (model.folder / CONFIG).write_text(json.dumps(model.config), encoding="utf-8")
        for weights in model.files:
            (model.folder / weights.name).symlink_to(weights.resolve())
        if len(model.files) > 1:
            index = {"metadata": {}, "weight_map": {name: tensor.file.name for name, tensor in tensors.items()}}
            (model.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        yield model


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Forbid huggingface_hub, and libraries that use it, to download."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_described(model: ForeignModel, n_described: int) -> None:
    """Raise InputError if the model that a library builds from config.json is far larger than the files."""
    n_stored = n_elements(model.tensors)
    if n_described > 2 * n_stored + SPARE_ELEMENTS:
        raise InputError(
            f"{model.source} describes a model of {n_described:,} values, and the files hold "
            f"{n_stored:,}; it is not that of these weights"
        )


def refuse_quantized(model: ForeignModel) -> None:
    """Raise InputError if a model's weights are quantised."""
    for place, key, value in _every_key(model.config):
        if key in QUANTIZED and value:
            raise InputError(
                f"{model.source}: {brief_name(place)} = {quoted(value)} cannot be honoured; {NO_QUANTIZED}"
            )


def check_all_finite(model: ForeignModel) -> None:
    """Raise InputError, naming the tensor, if one holds NaN or Inf."""
    for name, tensor in model.tensors.items():
        if tensor.is_readable:
            check_finite(name, tensor.read(), tensor.file)


def _check_config(values: dict[str, Any], file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    largest = max(n_elements(tensors), LARGEST_SIZE)
    for place, key, value in _every_key(values):
        if not isinstance(value, int) or NO_SIZE.fullmatch(key):
            continue
        if COUNTS_LAYERS.fullmatch(key) and value > len(tensors):
            raise InputError(
                f"{file}: {brief_name(place)} = {quoted(value)} is more than the {len(tensors)} tensors of its files; "
                "it is not that of these weights"
            )
        if abs(value) > largest:
            raise InputError(f"{file}: {brief_name(place)} = {quoted(value)} is too large; take at most {largest:,}")


def _every_key(values: Any, above: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield every key at any depth: its path, its name, and its value."""
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in parts:
        if isinstance(key, str):
            yield f"{above}{key}", key, value
        yield from _every_key(value, f"{above}{key}.")


def _is_plain(value: Any) -> bool:
    """Return whether a value is a built-in function's name, or a mapping of such names by part of the model."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool) or (isinstance(value, str) and bool(re.fullmatch(r"[\w|]*", value)))


def _without(values: Any, keys: set[str]) -> Any:
    """Return a copy without these keys, at any depth."""
    if isinstance(values, dict):
        return {key: _without(value, keys) for key, value in values.items() if key not in keys}
    return [_without(value, keys) for value in values] if isinstance(values, list) else values
