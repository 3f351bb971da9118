"""Sources of text: embedded stories, TinyStories, or the user's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.config import DataConfig
from mlx_moe.data import parquet, stories
from mlx_moe.errors import InputError, one_line
from mlx_moe.extras import require
from mlx_moe.storage.atomic import absolute, culprit
from mlx_moe.storage.reading import NOT_JSON, is_unicode, not_json
from mlx_moe.storage.regular_files import fingerprint, is_git_lfs, open_regular
from mlx_moe.validation import nearest

BUILTIN = ("stories", "tinystories")
ENDINGS = (".txt", ".jsonl", ".parquet")
END_OF_TEXT = "<|endoftext|>"
TINYSTORIES = "roneneldan/TinyStories"
MOST_STORIES = 10_000_000
MOST_FILES, MOST_ENTRIES = 100_000, 1_000_000  # of a folder: data files, and all entries
MAX_LINE_BYTES = 64 << 20  # bytes of a line; also characters of a value
LONGEST_PIECE = 8 << 20  # characters without a line break; a tokenizer takes about 300 bytes for each
FEWEST_SPARSE = 1 << 30  # bytes; a larger text with holes was most likely never written in full
FIELD_HINT = "name one that holds text with -o data.text_field=NAME (of eval: --text-field NAME)"
NAMES_SHOWN, LONGEST_NAME_SHOWN = 10, 60


@dataclass(frozen=True)
class Source:
    """Text as documents. `identity` changes exactly when the text does; `description` is one line for people.

    `licence`: of the text; None if unknown.

    Each call of `documents()` starts over; blank documents are skipped. It raises InputError if the text cannot be
    read: no network, bad JSON, a missing field, bytes that are not UTF-8, only blank documents.
    """

    identity: str
    description: str
    documents: Callable[[], Iterator[str]]
    licence: str | None = None


def open_source(config: DataConfig) -> Source:
    """Return the source that a config names. Raises InputError for a missing file or an unknown suffix."""
    if config.source == "stories":
        return _stories(config.n_documents or 10_000)
    if config.source == "tinystories":
        return _tinystories(config.n_documents)
    return _files(config)


def _stories(n: int) -> Source:
    if n > MOST_STORIES:
        raise InputError(f"data.n_documents {n:,}: there are at most {MOST_STORIES:,} embedded stories; take fewer")
    return Source(
        f"stories:v{stories.VERSION}:{n}", f"{n:,} embedded stories", lambda: stories.stories(n), "MIT (part of mlxmoe)"
    )


def _tinystories(n: int | None) -> Source:
    def documents() -> Iterator[str]:
        rows = _stream_tinystories()
        while True:
            try:
                text = next(rows, None)
            except Exception as error:  # the remedies are the same for every failure on the way to the hub
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
    for library in ("datasets", "huggingface_hub"):
        require(library, "TinyStories")
    from huggingface_hub import HfApi

    # Ask briefly first: without a network, datasets retries for half a minute and prints every attempt.
    HfApi().dataset_info(TINYSTORIES, timeout=10)
    from datasets import load_dataset

    for row in load_dataset(TINYSTORIES, split="train", streaming=True):
        yield row["text"]


def _files(config: DataConfig) -> Source:
    absolute(Path(config.source))  # rejects invalid paths
    top, field = Path(config.source).expanduser(), config.text_field
    try:
        paths = _find(top, config.source)
    except OSError as error:
        raise _unreadable(culprit(error, top), error) from None
    identity = hashlib.sha256(repr(config.n_documents).encode())
    states = []
    for path in paths:
        ending = path.suffix.lower()
        sha256, state = _hash(path)
        states.append(state)
        identity.update(repr((ending, None if ending == ".txt" else field, sha256)).encode())

    def documents() -> Iterator[str]:
        texts = (text for path in paths for text in _READERS[path.suffix.lower()](path, field))
        yield from _not_blank(texts, config.n_documents, config.source)
        for path, state in zip(paths, states, strict=True):  # the identity must match what was read
            if _state(path) != state:
                raise _changed(path)

    limit = "" if config.n_documents is None else f", at most {config.n_documents:,} documents"
    where = config.source if top.is_file() else f"{config.source} ({len(paths)} files)"
    # a name may contain bytes that are not UTF-8
    description = f"{where}{limit}".encode(errors="backslashreplace").decode()
    return Source(f"files:{identity.hexdigest()}", description, documents)


def _find(top: Path, name: str) -> list[Path]:
    kinds = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
    if top.is_dir():
        paths = sorted(_walk(top))
        if not paths:
            raise InputError(f"folder {name!r} holds no {kinds} file; put one there or name another folder")
        return paths
    if not os.path.lexists(top):
        hint = nearest(top.name.lower(), BUILTIN, cutoff=0.6)
        raise InputError(
            f"no file or folder {name!r}; {hint}data is {', '.join(BUILTIN)}, a {kinds} file, or a folder of them"
        )
    if not top.exists():
        raise InputError(f"cannot read {name!r}: it is a link that leads nowhere; name the file itself")
    if top.suffix.lower() not in ENDINGS:
        ending = f"its ending is {top.suffix!r}" if top.suffix else "it has no ending"
        raise InputError(f"cannot read {name!r}: {ending}; it must be {kinds}")
    return [top]


def _walk(top: Path) -> Iterator[Path]:
    """Yield the data files in a folder and its subfolders; skip hidden ones, and do not follow links to folders.

    Hidden files belong to the file system: macOS writes a binary ._x.txt beside x.txt on foreign disks.
    """
    folders, entries, files = [top], 0, 0
    while folders:
        with os.scandir(folders.pop()) as inside:
            for entry in inside:
                entries += 1
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif path.suffix.lower() in ENDINGS and not path.is_dir():
                    files += 1
                    yield path
                if entries > MOST_ENTRIES or files > MOST_FILES:
                    raise InputError(
                        f"folder {str(top)!r} holds more than {MOST_ENTRIES:,} entries or {MOST_FILES:,} files to "
                        "read; join them to fewer, e.g. in JSONL"
                    )


def _hash(path: Path) -> tuple[str, list[int]]:
    """Return a file's SHA-256 and state. Raises InputError if it changes meanwhile or cannot be read."""
    try:
        with open(open_regular(path), "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size > FEWEST_SPARSE and os.lseek(stream.fileno(), 0, os.SEEK_HOLE) < status.st_size:
                raise InputError(
                    f"{path} has {status.st_size:,} bytes, some of which were never written; write it anew, whole"
                )
            if is_git_lfs(path):
                raise InputError(
                    f"{path} is a git-lfs pointer in place of the text; get it: git lfs pull, in its folder"
                )
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None
    state = fingerprint(status)[:3]  # without ctime, which changes when links to the file do
    if _state(path) != state:
        raise _changed(path)
    return digest, state


def _state(path: Path) -> list[int] | None:
    try:
        return fingerprint(path.stat())[:3]
    except OSError:
        return None


def _changed(path: Path) -> InputError:
    return InputError(f"{path} changed while it was read; run this again once it is whole")


def _read_txt(path: Path, field: str) -> Iterator[str]:
    document: list[str] = []
    name = str(path)
    for number, line in _lines(path):
        _check_pieces(line, f"{name} line {number}")
        if line.strip() == END_OF_TEXT:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _check_pieces(text: str, where: str) -> None:
    if len(text) > LONGEST_PIECE and (longest := max(map(len, text.split("\n")))) > LONGEST_PIECE:
        raise InputError(
            f"{where} has {longest:,} characters without a line end; at most {LONGEST_PIECE:,}; break it up, since a "
            "tokenizer takes a line at a time"
        )


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    name = str(path)
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line)
        except NOT_JSON as error:
            raise not_json(error, where, remedy="; every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} holds {type(row).__name__}; every line must be one JSON object")
        if field not in row:
            fields = [key for key, value in row.items() if isinstance(value, str)]
            raise _missing_field(where, field, fields, list(row))
        yield _text(row[field], where, field)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    name = str(path)
    try:
        with parquet.opened(path) as file:
            fields = parquet.text_columns(file)
            if field not in fields:
                raise _missing_field(name, field, fields, file.schema_arrow.names)
            for number, value in enumerate(parquet.values(path, file, field), start=1):
                yield _text(value, f"{name} row {number}", field)
    except OSError as error:
        raise _unreadable(path, error) from None


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, from 1, ending in \\n on every system, without a byte order mark."""
    try:
        with open(open_regular(path), "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{path} line {number} has more than {MAX_LINE_BYTES:,} bytes; break it up, since a "
                        "tokenizer takes a line at a time"
                    )
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
        raise InputError(f"{where}: field {_names([field])} holds {type(value).__name__}, not text; {FIELD_HINT}")
    check_text(value, f"{where}: field {_names([field])}")
    return value


def check_text(text: object, where: str) -> None:
    """Raise InputError unless a document is text that a tokenizer can take."""
    if not isinstance(text, str):
        raise InputError(f"{where} is {type(text).__name__}, not text; leave it out")
    if len(text) > MAX_LINE_BYTES:
        raise InputError(f"{where} has {len(text):,} characters; at most {MAX_LINE_BYTES:,}; split it")
    _check_pieces(text, where)
    if not is_unicode(text):
        raise InputError(f"{where} is not valid Unicode (half of a surrogate pair); fix or drop it")


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


def _missing_field(where: str, field: str, text_fields: list[str], fields: list[str]) -> InputError:
    what = f"{where} has no {'field' if field not in fields else 'text in field'} {_names([field])}"
    if text_fields:
        return InputError(f"{what}; {FIELD_HINT}, here {_names(text_fields)}")
    if field in fields and len(fields) == 1:
        return InputError(f"{what}, which is its only one and holds something else; write the text to it")
    return InputError(f"{what}, nor text in any of {_names(fields)}; write the text to a field of it")


def _names(names: list[str]) -> str:
    first = ", ".join(repr(name[:LONGEST_NAME_SHOWN]) for name in names[:NAMES_SHOWN])
    return f"{first} and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else first or "none"


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror or one_line(error)}; make it readable or leave it out")
