"""Reading what others wrote, and what a user did: every fault is one line that says where and why.

All text that comes from a file goes through here: regular files only, bounded in size and depth, UTF-8, no integer
that no computer counts to, no YAML that builds more than it says.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from mlx_moe.errors import InputError, one_line

LARGEST_CONFIG = 16 << 20  # bytes; the largest config.json known has some 100 kB
MOST_NODES = 1_000_000  # of a YAML text, its aliases written out
DEEPEST = 64  # levels of nesting
MOST_DIGITS = 308  # of an integer: what a float can hold
NOT_JSON = (ValueError, RecursionError)  # a JSONDecodeError is a ValueError, as are too many digits


def read_bytes(path: Path, at_most: int = LARGEST_CONFIG) -> bytes:
    """The bytes of a regular file. Raises InputError where it is none, is too large, or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"cannot read {path}: it is no regular file; name one")
            if status.st_size > at_most:
                raise InputError(
                    f"cannot read {path}: it has {status.st_size:,} bytes, and at most {at_most:,} are read of such a "
                    "file; is it the right one?"
                )
            return stream.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or one_line(error)}") from None
    except ValueError as error:  # a NUL byte in the name
        raise InputError(f"cannot read {str(path)!r}: {one_line(error)}") from None


def read_text(path: Path, at_most: int = LARGEST_CONFIG) -> str:
    """The text of a regular UTF-8 file. Raises InputError as `read_bytes` does, and where it is not UTF-8."""
    try:
        return read_bytes(path, at_most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; it must be UTF-8") from None


def own_file(folder: Path, name: str) -> Path | None:
    """A file of a folder that came from elsewhere; None where there is none.

    Raises InputError where it is a link to somewhere outside: what lies there is the user's, and not the model's. The
    hub's cache keeps its files in `blobs` and links to them, which is inside.
    """
    file = folder / name
    if not os.path.lexists(file):
        return None
    within = [folder.resolve()]
    if within[0].parent.name == "snapshots":
        within.append(within[0].parents[1] / "blobs")
    if not any(file.resolve().is_relative_to(place) for place in within):
        raise InputError(f"{file} is a link to {file.resolve()}, outside its folder; put a copy of the file there")
    return file if file.is_file() else None


def read_json(path: Path, at_most: int = LARGEST_CONFIG) -> Any:
    """The values of a JSON file, of whatever type. Raises InputError."""
    return parse_json(read_text(path, at_most), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The values of a YAML or JSON file with a mapping at the top; none of an empty file. Raises InputError."""
    text = read_text(path)
    values = parse_json(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; it must be a mapping of keys to values")
    return values


def parse_json(text: str, where: str) -> Any:
    """The values of a JSON text; `where` says in an InputError what it is."""
    try:
        values = json.loads(text, parse_int=_integer)
    except NOT_JSON as error:
        raise InputError(f"{where} is not valid JSON: {one_line(error, limit=300)}") from None
    check_values(values, where)
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text: mappings, lists, strings, numbers, booleans and null; no key twice."""
    try:
        loader = _PlainLoader(text)
        values = loader.get_single_data()
    except (yaml.YAMLError, *NOT_JSON, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise InputError(f"{where} is not valid YAML: {one_line(error, limit=300)}") from None
    check_values(values, where)
    return values


def check_values(values: Any, where: str) -> None:
    """Raise InputError where parsed values are nested too deep, or hold text that cannot be written as UTF-8."""
    level, depth = [values], 0
    while level:
        if depth > DEEPEST:
            raise InputError(f"{where} is nested more than {DEEPEST} levels deep; flatten it")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not is_unicode(value):
                raise InputError(f"{where} holds half of a surrogate pair, which is no character; take it out")
            elif isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
                raise InputError(f"{where} holds an integer of more than {MOST_DIGITS} digits; shorten it")
        level, depth = below, depth + 1


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it holds no half of a surrogate pair, as bytes that are no UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def _written_out_size(node: Any, known: dict[int, int]) -> int:
    """The number of values that a YAML node stands for, each alias counted as what it repeats."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.composer.ComposerError(None, None, "an alias is part of what it repeats", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0  # not known yet: whoever comes by here again is inside it
    value = node.value if isinstance(node.value, list) else []
    parts = [part for entry in value for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = 1 + sum(_written_out_size(part, known) for part in parts)
    return known[id(node)]


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without dates, keys that come twice, and aliases that multiply without end or contain themselves."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _written_out_size(node, {}) > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"its aliases stand for more than {MOST_NODES:,} values")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None) or key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_undefined)  # type: ignore[type-var]
