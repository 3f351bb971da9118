"""Safetensors files, one tensor at a time: a model that fills the memory once is never there twice.

The format: 8 bytes with the length of the header, the header in JSON, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mlx_moe.errors import InputError, one_line
from mlx_moe.validation import read_mapping

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers' own limit is 50 GB, the hub asks for 5 GB
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> NDArray[np.float32]:
        """Its values as float32, exactly: float16 and bfloat16 are part of it."""
        count = int(np.prod(self.shape))
        raw = np.fromfile(self.file, DTYPES[self.dtype], count, offset=self.offset).reshape(self.shape)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is float32's upper half
        return raw.astype(np.float32, copy=False)


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model, from one file or from the shards that its index names.

    Raises InputError where a file is missing, damaged, or does not hold what the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder} holds both {SINGLE} and {INDEX}; delete the one that is not the model")
    if single.is_file():
        return _header(single)
    if not index.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        found = f"only {pickles[0]}, a pickle, and reading one can run code" if pickles else f"no {SINGLE}"
        raise InputError(f"{folder} holds {found}; save the model as safetensors (transformers: save_pretrained)")
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download it anew")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        file = folder / shard
        if file.parent != folder:
            raise InputError(f"{index} names {shard}, which is not in its folder")
        if not file.is_file():
            raise InputError(f"{index} names {shard}, which is missing; download it too")
        for name, tensor in _header(file).items():
            if places.get(name) != shard:
                raise InputError(f"{file} holds {name}, which {INDEX} places in {places.get(name, 'no file')}")
            tensors[name] = tensor
    if lost := sorted(places.keys() - tensors.keys()):
        raise InputError(f"{index} places {lost[0]} in {places[lost[0]]}, which does not hold it ({len(lost)} such)")
    return tensors


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "np"):
            pass  # checks the header against the file's size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot read {file}: {one_line(error)}; it is damaged or cut short, get it anew") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def write_tensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str], NDArray[np.float32]], shard_bytes: int
) -> None:
    """Write float32 tensors, each asked for when its turn comes; in shards with an index above `shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        if shards[-1] and _bytes(shape) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= _bytes(shape)
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], tensor)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        _write_file(folder / file, shard, tensor)
    index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, shapes: dict[str, tuple[int, ...]], tensor: Callable[[str], NDArray[np.float32]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses the file
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(np.ascontiguousarray(tensor(name), "<f4").data)


def _bytes(shape: Iterable[int]) -> int:
    return 4 * int(np.prod(tuple(shape)))
