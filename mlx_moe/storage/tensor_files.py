"""Safetensors files, memory-mapped on reading and streamed on writing: a model need not fit in memory.

Format: 8 bytes with the length of the header, the header in JSON, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mlx_moe.errors import InputError, brief_name, one_line
from mlx_moe.parameters import LazyWeights
from mlx_moe.storage.reading import NOT_JSON, own_file, read_mapping
from mlx_moe.storage.regular_files import is_git_lfs, open_regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # transformers' default is 50 GB, the hub asks for 5 GB
STORED_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PIECE_BYTES = 4 << 20  # hashed and written at once; it fits the cache that both read it from
WRITE_BYTES = 256 << 10  # per write call; with 4 MB, Linux (6.18, ext4) takes twice as long
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a file."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_readable(self) -> bool:
        """Return whether `read` supports its dtype."""
        return self.dtype in STORED_DTYPES

    def read(self) -> NDArray[np.float32]:
        """Return the values as float32: memory-mapped if stored so, else converted exactly."""
        # One map per tensor, so that its pages are freed with it; mode "c" (copy on write), as torch wants writable
        # memory.
        stored = np.asarray(np.memmap(self.file, STORED_DTYPES[self.dtype], "c", self.offset, self.shape))
        if self.dtype == "BF16":
            wide = stored.astype(np.uint32)
            wide <<= 16  # bfloat16 is float32's upper half
            return wide.view(np.float32)
        return np.require(stored, np.float32, "A")  # files need not align tensors


def stored_weights(tensors: Mapping[str, StoredTensor]) -> LazyWeights:
    return LazyWeights(tensors, lambda name: tensors[name].read())


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return a model's tensors, from one file or from the shards of its index.

    Raises InputError if a file is missing, damaged, a link out of the folder, or contradicts the index.
    """
    single, index = own_file(folder, SINGLE), own_file(folder, INDEX)
    if not single and not index:
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        found = f"only {pickles[0]}, a pickle, and reading one can run code" if pickles else f"no {SINGLE}"
        raise InputError(f"{folder} holds {found}; save the model as safetensors (transformers: save_pretrained)")
    places = _read_index(index) if index else {}
    if single:
        if set(places.values()) - {SINGLE}:
            raise InputError(f"{folder} holds both {SINGLE} and {INDEX}; delete the one that is not the model")
        tensors = read_header(single)
        if not tensors:
            raise InputError(f"{single} holds no tensor; get it anew")
        if places and (odd := sorted(places.keys() ^ tensors.keys())):
            raise InputError(f"{index} and {SINGLE} do not hold the same tensors: {brief_name(odd[0])}; get both anew")
        return tensors
    tensors = {}
    for shard in sorted(set(places.values())):
        if not SHARD.fullmatch(shard):
            raise InputError(f"{index} names {brief_name(shard)}, which is not in its folder, or no .safetensors file")
        file = own_file(folder, shard)
        if file is None:
            raise InputError(f"{index} names {brief_name(shard)}, which is missing; download it too")
        for name, tensor in read_header(file).items():
            if places.get(name) != shard:
                place = brief_name(places.get(name, "no file"))
                raise InputError(f"{file} holds {brief_name(name)}, which {INDEX} places in {place}; download it anew")
            tensors[name] = tensor
    if lost := sorted(places.keys() - tensors.keys()):
        raise InputError(
            f"{index} places {brief_name(lost[0])} in {brief_name(places[lost[0]])}, which does not hold it "
            f"({len(lost)} such); download it anew"
        )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download it anew")
    return places


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file. Raises InputError if it is damaged."""
    try:
        with open(open_regular(file), "rb") as stream:  # unlike safe_open, reports why a file cannot be opened
            with safe_open(file, "np"):
                pass  # checks the header against the file's size: tensors lie within the file and do not overlap
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, SafetensorError, *NOT_JSON) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        if is_git_lfs(file):
            raise InputError(
                f"{file} is a git-lfs pointer in place of the weights; get them: git lfs pull, in its folder"
            ) from None
        raise InputError(f"cannot read {file}: {one_line(error)}; it is damaged or cut short, get it anew") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def n_elements(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the total number of elements."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def check_finite(name: str, array: NDArray[np.float32], where: Path | str, remedy: str = "get the model anew") -> None:
    """Raise InputError, naming the tensor, if an array holds NaN or Inf."""
    # A sum costs less than half of an elementwise test and misses no NaN or Inf; finite values may overflow.
    with np.errstate(all="ignore"):
        if np.isfinite(np.sum(array)):
            return
    if n_bad := array.size - int(np.count_nonzero(np.isfinite(array))):
        raise InputError(
            f"{where}: tensor {brief_name(name)} holds NaN or Inf ({n_bad:,} of {array.size:,} values); {remedy}"
        )


# Returns a tensor's values in consecutive blocks, in memory order.
Blocks = Callable[[str], Iterable[NDArray[Any]]]


def write_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], blocks: Blocks, shard_bytes: int) -> None:
    """Write float32 tensors, each requested when its turn comes; beyond `shard_bytes`, in shards with an index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        if shards[-1] and _bytes(shape) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= _bytes(shape)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], blocks)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        write_file(folder / file, shard, blocks)
    index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, shapes: Mapping[str, tuple[int, ...]], blocks: Blocks, hashed: bool = True) -> str:
    """Write float32 tensors in this order; return the file's SHA-256, or "" unless `hashed`.

    A thread hashes each piece while it is written. No tensor is kept beyond its turn.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream, ThreadPoolExecutor(1) as thread:

        def write(block: NDArray[Any]) -> None:
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            for piece in _cut(data, PIECE_BYTES):
                hashing = thread.submit(digest.update, piece.data) if hashed else None
                for part in _cut(piece, WRITE_BYTES):
                    stream.write(part.data)
                if hashing:
                    hashing.result()

        write(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
        for name in shapes:
            for block in blocks(name):
                write(np.asarray(block, "<f4"))
    return digest.hexdigest() if hashed else ""


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cut(data: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _bytes(shape: Iterable[int]) -> int:
    return 4 * math.prod(shape)
