"""Text becomes token files once; batches are drawn from them without any state."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import DataConfig
from mlx_moe.data.sources import Source, open_source
from mlx_moe.data.tokenizers import Tokenizer, cut, make_tokenizer
from mlx_moe.errors import InputError
from mlx_moe.storage.tensor_files import sha256

Tokens = NDArray[np.uint16] | NDArray[np.uint32]

LAYOUT = 2  # of a cache entry: raise it with every change of what is written
SPLITS = ("train", "validation")
DOCUMENTS_PER_BATCH, CHARACTERS_PER_BATCH = 1000, 1_000_000


@dataclass(frozen=True)
class TokenData:
    """Tokens of both splits, read-only and memory-mapped, with an end of text after every document.

    `provenance` says what they were made from: `source`, `tokenizer`, and per split `documents`, `tokens`, `bytes` of
    UTF-8 text and `sha256` of the file.
    """

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    provenance: dict[str, Any]


def prepare(
    config: DataConfig, cache: Path | None = None, progress: Callable[[str], None] = lambda line: None
) -> TokenData:
    """The tokens of a config, made where the cache does not hold them. `progress` gets a line now and then.

    The cache is `$MLXMOE_CACHE`, else `~/.cache/mlxmoe`. A document belongs to validation by the hash of its text, so
    it stays there when data grows and copies never fall on both sides; where that leaves one side empty, validation is
    the last tokens instead.

    Raises InputError where the text, the tokenizer or the cache cannot be had.
    """
    root = cache or Path(os.environ.get("MLXMOE_CACHE") or "~/.cache/mlxmoe").expanduser()
    source = open_source(config)
    entry = root / _key(config, source)
    data = _load(entry)
    if data is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _build(entry, config, source, progress)
        except OSError as error:
            raise InputError(
                f"cannot write the token cache {root}: {error.strerror or error}; set MLXMOE_CACHE to a folder "
                "you can write"
            ) from None
        data = _load(entry)
        if data is None:
            raise InputError(
                f"token cache entry {entry} was damaged as soon as it was written; check the disk, run again"
            )
    return data


def held_out(config: DataConfig, cache: Path | None = None) -> Iterator[str]:
    """The documents of validation as text, in the source's order and whatever the tokenizer.

    No more of the source is read than is asked for; but where the split is by token, all of it is made tokens first.
    """
    found, has_train, held = False, False, list[str]()
    for text in open_source(config).documents():
        if is_held_out(text.encode(), config.validation_fraction):
            held.append(text)
        else:
            has_train = True
        if has_train and held:
            found = True
            yield from held
            held.clear()
    if found:
        return
    data = prepare(config, cache)
    ends = [*np.flatnonzero(data.validation == data.tokenizer.eot_id), len(data.validation)]
    for start, end in pairwise([-1, *ends]):
        if start + 1 < end:
            yield data.tokenizer.decode(data.validation[start + 1 : end].tolist())


def batch(
    tokens: Tokens, *, seed: int, phase: int, step: int, rank: int = 0, batch_size: int, context_length: int
) -> NDArray[np.int32]:
    """Random windows, shape (batch_size, context_length + 1): a pure function of the arguments.

    Raises InputError where there are fewer than context_length + 1 tokens.
    """
    check_length(tokens, context_length)
    # Phase, rank and step in 8, 16 and 40 bits of their own: no two of them share a stream.
    key = np.array([seed % 2**64, phase << 56 | rank << 40 | step], dtype=np.uint64)
    # Raw numbers, since NumPy may change how its distributions draw; the bias of the remainder is below 2⁻³⁰.
    starts = np.random.Philox(key=key).random_raw(batch_size) % np.uint64(len(tokens) - context_length)
    return _windows(tokens, starts.astype(np.int64), context_length)


def fixed_windows(tokens: Tokens, n: int, context_length: int) -> NDArray[np.int32]:
    """Evenly spaced windows that do not overlap, shape (at most n, context_length + 1); fewer where no more fit.

    Raises InputError where there are fewer than context_length + 1 tokens.
    """
    check_length(tokens, context_length)
    width = context_length + 1
    count = min(n, len(tokens) // width)
    starts = np.arange(count) * (len(tokens) - width) // max(count - 1, 1)
    return _windows(tokens, starts, context_length)


def _windows(tokens: Tokens, starts: NDArray[np.int64], context_length: int) -> NDArray[np.int32]:
    return tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int32)


def check_length(tokens: Tokens, context_length: int) -> None:
    if len(tokens) < context_length + 1:
        raise InputError(
            f"{len(tokens)} tokens do not fill one window of context_length {context_length} + 1; take more data, a "
            "shorter model.context_length, or a larger data.validation_fraction if it is validation that is short"
        )


def _key(config: DataConfig, source: Source) -> str:
    tokenizer = config.tokenizer
    folder = Path(tokenizer).expanduser()
    if tokenizer != "char" and folder.is_dir():
        tokenizer = f"folder:{Tokenizer.load(folder).identity}"
    parts = [LAYOUT, source.identity, tokenizer, config.validation_fraction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _load(entry: Path) -> TokenData | None:
    """A cache entry, or None where it is missing or damaged."""
    try:
        provenance = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(provenance["dtype"])
        splits = []
        for name in SPLITS:
            path = entry / f"{name}.bin"
            if path.stat().st_size != provenance[name]["tokens"] * dtype.itemsize:
                return None
            splits.append(np.memmap(path, dtype=dtype, mode="r"))
        tokenizer = Tokenizer.load(entry / "tokenizer")
        if tokenizer.identity != provenance["tokenizer"]["identity"]:
            return None
        return TokenData(splits[0], splits[1], tokenizer, provenance)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(entry: Path, config: DataConfig, source: Source, progress: Callable[[str], None]) -> None:
    scratch = entry.parent / f".{entry.name}.{os.getpid()}.{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        progress(f"reading {source.description}; tokenizer {config.tokenizer}")
        tokenizer = make_tokenizer(config.tokenizer, source.documents)
        tokenizer.save(scratch / "tokenizer")
        provenance = _write_splits(scratch, config, source, tokenizer, progress)
        (scratch / "meta.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        _publish(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, entry: Path) -> None:
    """Rename a finished entry into place; where another process was faster, its entry stays."""
    try:
        scratch.rename(entry)
    except OSError:
        if _load(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
            scratch.rename(entry)


@dataclass
class _Split:
    """One side while it is written."""

    file: BinaryIO
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def _write_splits(
    folder: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, progress: Callable[[str], None]
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    fraction = config.validation_fraction
    with (folder / "train.bin").open("wb") as train_file, (folder / "validation.bin").open("wb") as validation_file:
        train, validation = _Split(train_file), _Split(validation_file)
        for number, texts in enumerate(_batches(source.documents()), start=1):
            splits = []
            for text in texts:
                utf8 = text.encode()
                split = validation if is_held_out(utf8, fraction) else train
                split.documents += 1
                split.bytes += len(utf8)
                splits.append(split)
            for document, ids in _encode(tokenizer, texts, dtype):
                splits[document].file.write(ids.tobytes())
                splits[document].tokens += len(ids)
            if number % 10 == 0:
                documents, tokens = train.documents + validation.documents, train.tokens + validation.tokens
                progress(f"encoded {documents:,} documents, {tokens:,} tokens")
    by_document = bool(train.documents and validation.documents)
    if not by_document:
        _split_by_token(folder, train, validation, fraction, dtype)
    return {
        "source": {"identity": source.identity, "description": source.description, "licence": source.licence},
        "tokenizer": {"spec": config.tokenizer, "identity": tokenizer.identity, "vocab_size": tokenizer.vocab_size},
        "validation_fraction": fraction,
        "split": "by document" if by_document else "by token",
        "dtype": dtype.name,
        "train": _describe(folder / "train.bin", train),
        "validation": _describe(folder / "validation.bin", validation),
    }


def _split_by_token(folder: Path, train: _Split, validation: _Split, fraction: float, dtype: np.dtype[Any]) -> None:
    """Hold out the last tokens of a text whose documents all fell on one side. Bytes are shared in proportion."""
    if not train.documents:
        (folder / "validation.bin").replace(folder / "train.bin")
        train.documents, train.tokens, train.bytes = validation.documents, validation.tokens, validation.bytes
    total_tokens, total_bytes = train.tokens, train.bytes
    validation.documents = 0
    validation.tokens = min(max(1, round(total_tokens * fraction)), total_tokens - 1)
    validation.bytes = round(total_bytes * validation.tokens / total_tokens)
    train.tokens, train.bytes = total_tokens - validation.tokens, total_bytes - validation.bytes
    with (folder / "train.bin").open("r+b") as source, (folder / "validation.bin").open("wb") as target:
        source.seek(train.tokens * dtype.itemsize)
        shutil.copyfileobj(source, target)
        source.truncate(train.tokens * dtype.itemsize)


def _describe(path: Path, split: _Split) -> dict[str, Any]:
    return {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes, "sha256": sha256(path)}


def is_held_out(utf8: bytes, fraction: float) -> bool:
    """Whether a document belongs to validation: by the hash of its text, so whatever else there is."""
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=6).digest()) / 2**48 < fraction


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if len(texts) == DOCUMENTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _encode(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> Iterator[tuple[int, Tokens]]:
    """(number of the text, ids) of every text in turn, an end of text after each.

    A book in one document comes in pieces: as Python's numbers its ids would take a hundred times its size.
    """
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in cut(text)]
    for start, end in pairwise([*_starts([len(piece) for _, piece in pieces]), len(pieces)]):
        encoded = tokenizer.encode_batch([piece for _, piece in pieces[start:end]])
        for index, ids in enumerate(encoded, start):
            number = pieces[index][0]
            is_last = index + 1 == len(pieces) or pieces[index + 1][0] != number
            yield number, np.array([*ids, tokenizer.eot_id] if is_last else ids, dtype=dtype)


def _starts(lengths: list[int]) -> Iterator[int]:
    """Where to begin another batch, so that each holds CHARACTERS_PER_BATCH at most, or one piece."""
    characters = CHARACTERS_PER_BATCH
    for index, length in enumerate(lengths):
        characters += length
        if characters > CHARACTERS_PER_BATCH:
            yield index
            characters = length
