"""Where text comes from: the embedded stories, TinyStories, or the user's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.config import DataConfig
from mlx_moe.data import stories
from mlx_moe.errors import InputError, one_line
from mlx_moe.storage.tensor_files import sha256
from mlx_moe.validation import nearest

BUILTIN = ("stories", "tinystories")
ENDINGS = (".txt", ".jsonl", ".parquet")
END_OF_TEXT = "<|endoftext|>"
TINYSTORIES = "roneneldan/TinyStories"


@dataclass(frozen=True)
class Source:
    """Text, as documents. `identity` changes exactly when the text would; `description` is one line for people.

    `licence`: what the text may be used under, None where we cannot know.

    `documents()` starts over with every call and yields no blank document. It raises InputError where the text cannot
    be had: no network, bad JSON, a missing field, bytes that are not UTF-8, nothing but blanks.
    """

    identity: str
    description: str
    documents: Callable[[], Iterator[str]]
    licence: str | None = None


def open_source(config: DataConfig) -> Source:
    """The source that a config names. Raises InputError where there is no such file, or no known ending."""
    if config.source == "stories":
        return _stories(config.n_documents or 10_000)
    if config.source == "tinystories":
        return _tinystories(config.n_documents)
    return _files(config)


def _stories(n: int) -> Source:
    return Source(
        f"stories:v{stories.VERSION}:{n}", f"{n:,} embedded stories", lambda: stories.stories(n), "MIT (part of mlxmoe)"
    )


def _tinystories(n: int | None) -> Source:
    def documents() -> Iterator[str]:
        rows = _stream_tinystories()
        while True:
            try:
                text = next(rows, None)
            except Exception as error:  # whatever fails between here and the hub, the ways out are the same
                raise InputError(
                    f"cannot read {TINYSTORIES} from the Hugging Face hub ({one_line(error)}); take --data stories, "
                    "which is embedded, or --data FILE with a local copy"
                ) from None
            if text is None:
                return
            yield text

    return Source(
        f"{TINYSTORIES}:{n}",
        f"TinyStories, {'all' if n is None else f'the first {n:,}'} stories",
        lambda: _not_blank(documents(), n, TINYSTORIES),
        f"CDLA-Sharing-1.0 (https://huggingface.co/datasets/{TINYSTORIES})",
    )


def _stream_tinystories() -> Iterator[str]:
    from huggingface_hub import HfApi

    # One quick question first: without a network, datasets itself retries for half a minute and prints every attempt.
    HfApi().dataset_info(TINYSTORIES, timeout=10)
    from datasets import load_dataset

    for row in load_dataset(TINYSTORIES, split="train", streaming=True):
        yield row["text"]


def _files(config: DataConfig) -> Source:
    top, field = Path(config.source).expanduser(), config.text_field
    try:
        paths = _find(top, config.source)
    except OSError as error:
        raise _unreadable(top, error) from None
    identity = hashlib.sha256(repr(config.n_documents).encode())
    for path in paths:
        ending = path.suffix.lower()
        identity.update(repr((ending, None if ending == ".txt" else field, _hash(path))).encode())

    def documents() -> Iterator[str]:
        for path in paths:
            yield from _READERS[path.suffix.lower()](path, field)

    limit = "" if config.n_documents is None else f", at most {config.n_documents:,} documents"
    where = config.source if top.is_file() else f"{config.source} ({len(paths)} files)"
    return Source(
        f"files:{identity.hexdigest()}",
        f"{where}{limit}",
        lambda: _not_blank(documents(), config.n_documents, config.source),
    )


def _find(top: Path, name: str) -> list[Path]:
    kinds = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
    if top.is_dir():
        inside = sorted(path for path in top.rglob("*") if path.suffix.lower() in ENDINGS and not path.is_dir())
        # Hidden files are the file system's own: macOS writes a binary ._x.txt beside x.txt on foreign disks.
        paths = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(top).parts)]
        if not paths:
            raise InputError(f"folder {name!r} holds no {kinds} file; put one there or name another folder")
        return paths
    if not top.exists():
        hint = nearest(top.name.lower(), BUILTIN, cutoff=0.6)
        raise InputError(
            f"no file or folder {name!r}; {hint}data is {', '.join(BUILTIN)}, a {kinds} file, or a folder of them"
        )
    if top.suffix.lower() not in ENDINGS:
        raise InputError(f"cannot read {name!r}: its ending is {top.suffix or 'missing'!r}; it must be {kinds}")
    return [top]


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_txt(path: Path, field: str) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(path):
        if line.strip() == END_OF_TEXT:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({one_line(error)}); every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} holds {type(row).__name__}; every line must be one JSON object")
        if field not in row:
            raise _missing_field(where, field, list(row))
        yield _text(row[field], where, field)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _missing_field(str(path), field, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(value, f"{path} row {number}", field)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file ({one_line(error)}); write it anew") from None
    except OSError as error:
        raise _unreadable(path, error) from None


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines from 1 on, ending in \\n on every system, without a byte order mark."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise InputError(
                        f"{path} line {number} is not UTF-8 (byte 0x{byte:02x}); convert it, e.g. with iconv -t UTF-8"
                    ) from None
                yield number, text.replace("\r\n", "\n")
    except OSError as error:
        raise _unreadable(path, error) from None


def _text(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {field!r} holds {type(value).__name__}, not text; set data.text_field to one that does"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {field!r} is not valid Unicode ({error.reason}); mend or drop it") from None
    return value


def _not_blank(documents: Iterator[str], n: int | None, name: str) -> Iterator[str]:
    count = 0
    for text in documents:
        if text.strip():
            yield text
            count += 1
            if count == n:
                return
    if count == 0:
        raise InputError(f"{name!r} holds no text: every document in it is blank; name other data")


def _missing_field(where: str, field: str, fields: list[str]) -> InputError:
    known = ", ".join(map(repr, fields)) or "none"
    return InputError(f"{where} has no field {field!r}; set data.text_field to one there is: {known}")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or one_line(error)}; make it readable or leave it out")
