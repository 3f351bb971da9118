"""Token files, built once from text and cached, and stateless batches drawn from them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_moe.config import DataConfig
from mlx_moe.data.sources import Source, open_source
from mlx_moe.data.token_file import Contents, StoredTokens, TokenFile, inspect
from mlx_moe.data.tokenizers import Tokenizer, cut, make_tokenizer
from mlx_moe.errors import InputError, one_line
from mlx_moe.storage import locks
from mlx_moe.storage.atomic import (
    absolute,
    cache_folder,
    clean_leftovers,
    make_folder,
    new_folder,
    quarantine,
    remove_folder,
    replacing,
)
from mlx_moe.storage.reading import read_json
from mlx_moe.storage.records import Provenance, read_record
from mlx_moe.storage.tokenizer_files import FILES as TOKENIZER_FILES
from mlx_moe.validation import validate

LAYOUT = 2  # of a cache entry: increment with every change of what is written
SPLITS = ("train", "validation")
META, VERIFIED, TOKENIZER = "meta.json", "verified.json", "tokenizer"
WAIT_SECONDS = 0.2  # between checks whether another process has finished an entry
DOCUMENTS_PER_BATCH, CHARACTERS_PER_BATCH = 1000, 1_000_000


@dataclass(frozen=True)
class TokenSplits:
    """Training and validation tokens, in memory or on disk."""

    train: StoredTokens | TokenFile
    validation: StoredTokens | TokenFile


@dataclass(frozen=True)
class TokenData(TokenSplits):
    """Tokens of both splits, read-only and on disk, with an end of text after every document.

    `provenance` records their origin: `source`, `tokenizer`, and per split `documents`, `tokens`, `bytes` of UTF-8 text
    and `sha256` of the file.
    """

    train: TokenFile
    validation: TokenFile
    tokenizer: Tokenizer
    provenance: dict[str, Any]


def prepare(
    config: DataConfig, cache: Path | None = None, progress: Callable[[str], None] = lambda line: None
) -> TokenData:
    """Return the tokens of a config, built unless the cache has them. `progress` receives status lines.

    The cache is `$MLXMOE_CACHE`, else `~/.cache/mlxmoe`. A document is assigned to validation by the hash of its text,
    so it stays there when data grows and copies never fall on both sides; if that leaves one side empty, validation is
    the last tokens instead. If another process is building the same tokens, this one waits.

    Raises InputError if the text, the tokenizer or the cache is unavailable.
    """
    root = cache or cache_folder()
    wanted = _Wanted(config, open_source(config), _local_tokenizer(config.tokenizer))
    entry = root / _key(wanted)
    try:
        clean_leftovers(root)
        if os.path.lexists(entry):
            with contextlib.suppress(InputError):
                return _open(entry, wanted)
        make_folder(root)
        with _held(entry, progress):
            return _open_or_build(entry, wanted, progress)
    except OSError as error:
        raise InputError(
            f"cannot write the token cache {root}: {error.strerror or one_line(error)}; set MLXMOE_CACHE to a folder "
            "you can write"
        ) from None


def held_out(config: DataConfig, cache: Path | None = None) -> Iterator[str]:
    """Yield the validation documents as text, in the source's order, independent of the tokenizer.

    The source is read lazily; but if the split is by token, all of it is tokenised first.
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
    tokens = data.validation[:]
    ends = [*np.flatnonzero(tokens == data.tokenizer.eot_id), len(tokens)]
    for start, end in pairwise([-1, *ends]):
        if start + 1 < end:
            yield data.tokenizer.decode(tokens[start + 1 : end].tolist())


def batch(
    tokens: StoredTokens | TokenFile,
    *,
    seed: int,
    phase: int,
    step: int,
    batch_size: int,
    context_length: int,
) -> NDArray[np.int32]:
    """Return random windows, shape (batch_size, context_length + 1): a pure function of the arguments.

    Raises InputError for fewer than context_length + 1 tokens.
    """
    check_length(tokens, context_length)
    # Phase and step have separate fields of 8 and 56 bits, so all streams differ.
    key = np.array([seed % 2**64, phase << 56 | step], dtype=np.uint64)
    # Use raw numbers, since NumPy may change its distributions; the modulo bias is below 2⁻³⁰.
    starts = np.random.Philox(key=key).random_raw(batch_size) % np.uint64(len(tokens) - context_length)
    return _windows(tokens, starts.astype(np.int64), context_length)


def fixed_windows(tokens: StoredTokens | TokenFile, n: int, context_length: int) -> NDArray[np.int32]:
    """Return evenly spaced, non-overlapping windows, shape (at most n, context_length + 1); fewer if no more fit.

    Raises InputError for fewer than context_length + 1 tokens.
    """
    check_length(tokens, context_length)
    width = context_length + 1
    count = min(n, len(tokens) // width)
    starts = np.arange(count) * (len(tokens) - width) // max(count - 1, 1)
    return _windows(tokens, starts, context_length)


def _windows(tokens: StoredTokens | TokenFile, starts: NDArray[np.int64], context_length: int) -> NDArray[np.int32]:
    if isinstance(tokens, TokenFile):
        return tokens.windows(starts, context_length + 1)
    return tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int32)


def check_length(
    tokens: StoredTokens | TokenFile, context_length: int, split: Literal["train", "validation"] | None = None
) -> None:
    """Raise InputError, naming the `split`, if the tokens do not fill one window."""
    if len(tokens) < context_length + 1:
        fraction = {"train": "smaller", "validation": "larger", None: "different"}[split]
        raise InputError(
            f"the {len(tokens)} tokens{f' of {split}' if split else ''} do not fill one window of context_length "
            f"{context_length} + 1; take more data, a shorter model.context_length, or a {fraction} "
            "data.validation_fraction"
        )


@dataclass(frozen=True)
class _Wanted:
    """Inputs of the tokens to build. `tokenizer` is already loaded if it comes from a folder."""

    config: DataConfig
    source: Source
    tokenizer: Tokenizer | None


def _local_tokenizer(spec: str) -> Tokenizer | None:
    folder = absolute(Path(spec))
    with contextlib.suppress(OSError):  # a name too long for a folder
        if spec != "char" and folder.is_dir():
            return Tokenizer.load(folder)
    return None


def _key(wanted: _Wanted) -> str:
    """Return a cache entry's name: a hash of all that its tokens depend on, such as a local tokenizer's contents."""
    config = wanted.config
    tokenizer = config.tokenizer if wanted.tokenizer is None else f"folder:{wanted.tokenizer.identity}"
    parts = [LAYOUT, wanted.source.identity, tokenizer, config.validation_fraction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _held(entry: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Lock an entry; wait if another process holds it, since it builds the same tokens."""
    with contextlib.ExitStack() as stack:
        is_told = False
        while True:
            try:
                stack.enter_context(locks.holding(entry))
                break
            except locks.Busy:
                if not is_told:
                    progress("another process is making these tokens; waiting for it")
                is_told = True
                time.sleep(WAIT_SECONDS)
        yield


def _open_or_build(entry: Path, wanted: _Wanted, progress: Callable[[str], None]) -> TokenData:
    if os.path.lexists(entry):
        try:
            return _open(entry, wanted)  # another process may have built it meanwhile
        except InputError as error:
            reason = str(error).rpartition("; ")[0] or error  # drop the advice, which is carried out here
            progress(f"warning: the token cache is damaged and is made anew: {reason}")
            _remove(entry)
    # Without locks, another process may have finished first.
    with contextlib.suppress(FileExistsError), new_folder(entry) as partial:
        _build(partial, wanted, progress)
    try:
        return _open(entry, wanted)
    except InputError as error:
        raise InputError(f"the token cache was damaged as soon as it was written: {error}; check the disk") from None


def _open(entry: Path, wanted: _Wanted) -> TokenData:
    """Open a cache entry. Raises InputError if it is damaged or unreadable.

    The source's description is the current one: the same text may have had another path before.
    """
    config, source = wanted.config, wanted.source
    meta = read_record(Provenance, entry / META)
    tokenizer = wanted.tokenizer or Tokenizer.load(entry / TOKENIZER)
    recorded = meta.tokenizer
    if (tokenizer.identity, tokenizer.vocab_size) != (recorded.identity, recorded.vocab_size):
        raise InputError(f"{entry / TOKENIZER} is not the tokenizer that {META} names")
    if (meta.source.identity, meta.validation_fraction) != (source.identity, config.validation_fraction):
        raise InputError(f"{entry / META} is that of other data")
    known = _verified(entry)
    dtype, vocab_size = np.dtype(meta.dtype), tokenizer.vocab_size
    files = {}
    for name in SPLITS:
        split = getattr(meta, name)
        files[name] = TokenFile(entry / f"{name}.bin", dtype, split.tokens, split.sha256, vocab_size, known.get(name))
    if (found := {name: file.contents for name, file in files.items()}) != known:
        with contextlib.suppress(OSError):  # without write access, hash each time
            _note_verified(entry, found)
    provenance = meta.model_dump(mode="json")
    provenance["source"] |= {"description": source.description, "licence": source.licence}
    provenance["tokenizer"] |= {"spec": config.tokenizer}
    return TokenData(files["train"], files["validation"], tokenizer, provenance)


def _verified(entry: Path) -> dict[str, Contents]:
    """Return the contents of an entry's token files as last verified."""
    try:
        return validate(dict[str, Contents], read_json(entry / VERIFIED))
    except InputError:
        return {}


def _note_verified(entry: Path, contents: dict[str, Contents]) -> None:
    clean_leftovers(entry)
    with replacing(entry / VERIFIED) as partial:
        partial.write_text(json.dumps({name: asdict(value) for name, value in contents.items()}), encoding="utf-8")


def _remove(entry: Path) -> None:
    """Delete a damaged entry; rename it if it contains foreign files."""
    if entry.is_symlink() or not entry.is_dir() or not remove_folder(entry, _is_ours):
        quarantine(entry, "damaged")


def _is_ours(inside: Path) -> bool:
    ours = [META, VERIFIED, TOKENIZER, *(f"{name}.bin" for name in SPLITS)]
    return str(inside) in [*ours, *(f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES)]


def _build(folder: Path, wanted: _Wanted, progress: Callable[[str], None]) -> None:
    config, source = wanted.config, wanted.source
    progress(f"reading {source.description}; tokenizer {config.tokenizer}")
    tokenizer = wanted.tokenizer or make_tokenizer(config.tokenizer, source.documents)
    tokenizer.save(folder / TOKENIZER)
    provenance, contents = _write_splits(folder, config, source, tokenizer, progress)
    (folder / META).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    _note_verified(folder, contents)


@dataclass
class _Split:
    """A split while it is written."""

    file: BinaryIO
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def _write_splits(
    folder: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, progress: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Contents]]:
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
    contents = {name: _inspect(folder / f"{name}.bin", dtype) for name in SPLITS}
    provenance = {
        "source": {"identity": source.identity, "description": source.description, "licence": source.licence},
        "tokenizer": {"spec": config.tokenizer, "identity": tokenizer.identity, "vocab_size": tokenizer.vocab_size},
        "validation_fraction": fraction,
        "split": "by document" if by_document else "by token",
        "dtype": dtype.name,
        "train": _describe(train, contents["train"]),
        "validation": _describe(validation, contents["validation"]),
    }
    return provenance, contents


def _split_by_token(folder: Path, train: _Split, validation: _Split, fraction: float, dtype: np.dtype[Any]) -> None:
    """Hold out the last tokens if all documents fell on one side; bytes are divided in proportion."""
    if not train.documents:
        (folder / "validation.bin").replace(folder / "train.bin")
        train.documents, train.tokens, train.bytes = validation.documents, validation.tokens, validation.bytes
    total_tokens, total_bytes = train.tokens, train.bytes
    if total_tokens < 2:
        raise InputError("the tokenizer makes no tokens of this text; take another one, or other data")
    validation.documents = 0
    validation.tokens = min(max(1, round(total_tokens * fraction)), total_tokens - 1)
    validation.bytes = round(total_bytes * validation.tokens / total_tokens)
    train.tokens, train.bytes = total_tokens - validation.tokens, total_bytes - validation.bytes
    with (folder / "train.bin").open("r+b") as source, (folder / "validation.bin").open("wb") as target:
        source.seek(train.tokens * dtype.itemsize)
        shutil.copyfileobj(source, target)
        source.truncate(train.tokens * dtype.itemsize)


def _inspect(path: Path, dtype: np.dtype[Any]) -> Contents:
    with path.open("rb") as file:
        return inspect(file.fileno(), dtype)


def _describe(split: _Split, contents: Contents) -> dict[str, Any]:
    return {
        "documents": split.documents,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "sha256": contents.sha256,
    }


def is_held_out(utf8: bytes, fraction: float) -> bool:
    """Return whether a document belongs to validation, by the hash of its text alone."""
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


def _encode(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> Iterator[tuple[int, StoredTokens]]:
    """Yield (number of the text, ids) of every text in turn, with an end of text after each.

    A book in one document comes in pieces: its ids as Python integers would take a hundred times its size.
    """
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in cut(text)]
    for start, end in pairwise([*_starts([len(piece) for _, piece in pieces]), len(pieces)]):
        encoded = tokenizer.encode_batch([piece for _, piece in pieces[start:end]])
        for index, ids in enumerate(encoded, start):
            number = pieces[index][0]
            is_last = index + 1 == len(pieces) or pieces[index + 1][0] != number
            array = np.array([*ids, tokenizer.eot_id] if is_last else ids, dtype=np.uint32)
            if array.max(initial=0) >= tokenizer.vocab_size:
                raise InputError(
                    f"the tokenizer gives token {array.max()}, and its vocabulary has {tokenizer.vocab_size}; save it "
                    "anew, or take another one"
                )
            yield number, array.astype(dtype)


def _starts(lengths: list[int]) -> Iterator[int]:
    """Yield the indices at which batches begin, so that each holds at most CHARACTERS_PER_BATCH, or a single piece."""
    characters = CHARACTERS_PER_BATCH
    for index, length in enumerate(lengths):
        characters += length
        if characters > CHARACTERS_PER_BATCH:
            yield index
            characters = length
