"""Safe reading of files and settings from outside; every fault is one line with the place and the reason.

All text from files passes through here, except rows of data and headers of tensors: regular files only, bounded in size
and depth, UTF-8, bounded integers, no YAML aliases that expand without limit.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from mlx_moe.errors import InputError, one_line, quoted
from mlx_moe.storage.regular_files import open_regular

LARGEST_CONFIG = 16 << 20  # bytes; the largest config.json known has about 100 kB
LARGEST_YAML = 100_000  # characters, parsed in a second or two; a config that lists all its layers has half of that
MOST_NODES = 100_000  # of a YAML text, aliases expanded
DEEPEST = 64  # levels of nesting
MOST_DIGITS = 308  # of an integer: the range of a float
TOO_LARGE = 10**MOST_DIGITS
NOT_JSON = (ValueError, RecursionError)  # JSONDecodeError and the error for too many digits are ValueErrors


def read_bytes(path: Path, at_most: int = LARGEST_CONFIG) -> bytes:
    """Return the bytes of a regular file. Raises InputError if it is not one, is too large, or cannot be read."""
    if "\0" in str(path):
        raise InputError(f"cannot read {path}: no path holds a NUL byte; leave it out")
    try:
        with open(open_regular(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > at_most:
                raise InputError(
                    f"cannot read {path}: it has {size:,} bytes, and at most {at_most:,} are read of such a "
                    "file; is it the right one?"
                )
            return stream.read(size)  # `read` allocates what it is asked for, so ask for no more than the size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or one_line(error)}") from None


def read_text(path: Path, at_most: int = LARGEST_CONFIG) -> str:
    """Return the text of a regular UTF-8 file, without a byte order mark.

    Raises InputError as `read_bytes` does, and if it is not UTF-8.
    """
    try:
        return read_bytes(path, at_most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; it must be UTF-8") from None


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder. Raises InputError if permissions forbid to look."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; make the folders above it readable") from None
    except (OSError, ValueError):  # a ValueError for a NUL byte
        return False


def own_file(folder: Path, name: str) -> Path | None:
    """Return a file of a folder from outside; None if there is none.

    Raises InputError if it links to a file outside the folder, which belongs to the user and not to the model. Links
    into the hub cache's `blobs` count as inside.
    """
    file = folder / name
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; make it readable") from None
    within = [folder.resolve()]
    if within[0].parent.name == "snapshots":
        within.append(within[0].parents[1] / "blobs")
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a RuntimeError before Python 3.13
        raise InputError(f"{file} is a link that leads back to itself; put the file there") from None
    if not any(target.is_relative_to(place) for place in within):
        raise InputError(f"{file} is a link to {target}, outside its folder; put a copy of the file there")
    if not file.is_file():
        raise InputError(f"{file} is no regular file, or a link to what is missing; put the file there")
    return file


def read_json(path: Path, at_most: int = LARGEST_CONFIG) -> Any:
    """Return the parsed values of a JSON file, of any type. Raises InputError."""
    return parse_json(read_text(path, at_most), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the top-level mapping of a YAML or JSON file; empty for an empty file. Raises InputError."""
    text = read_text(path)
    values = parse_json(text, str(path)) if path.suffix == ".json" else parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; it must be a mapping of keys to values")
    return values


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text without duplicate keys; `where` names the source in an InputError."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except NOT_JSON as error:
        raise not_json(error, where) from None
    check_values(values, where)
    return values


def not_json(error: Exception, where: str, remedy: str = "") -> InputError:
    """Return the InputError for a text on which `json.loads` raised one of NOT_JSON."""
    if "integer string conversion" in str(error):
        return InputError(f"{where} holds an integer of more than {MOST_DIGITS} digits; shorten it")
    return InputError(f"{where} is not valid JSON: {one_line(error, limit=300)}{remedy}")


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text: mappings with string keys, lists, strings, numbers, booleans and null; no duplicate keys.

    Numbers follow YAML 1.1 in base 10 (`1.0e-4`; `1e-4` is a string), booleans are `true` and `false`; everything else
    that YAML 1.1 takes for either stays a string.
    """
    if len(text) > LARGEST_YAML:
        raise InputError(
            f"{where} has {len(text):,} characters; at most {LARGEST_YAML:,} of YAML are read; is it YAML?"
        )
    try:
        values = _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark, problem = (
            error.problem_mark or error.context_mark,
            ", ".join(filter(None, (error.context, error.problem))),
        )
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{where} is not valid YAML: {' '.join(problem.split())[:300]}{place}") from None
    except (yaml.YAMLError, OverflowError, *NOT_JSON) as error:
        raise InputError(f"{where} is not valid YAML: {one_line(error, limit=300)}") from None
    check_values(values, where)
    return values


def check_values(values: Any, where: str) -> None:
    """Raise InputError if parsed values are nested too deep, or hold text that cannot be encoded as UTF-8."""
    level, depth = [values], 0
    while level:
        if depth > DEEPEST:
            raise InputError(f"{where} is nested more than {DEEPEST} levels deep; flatten it")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii() and not is_unicode(value):
                    raise InputError(f"{where} holds half of a surrogate pair, which is no character; take it out")
            elif isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and abs(value) >= TOO_LARGE:
                raise InputError(f"{where} holds an integer of more than {MOST_DIGITS} digits; shorten it")
        level, depth = below, depth + 1


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: no lone surrogates, which result from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {quoted(next(key for key in values if keys.count(key) > 1))} comes twice")
    return values


def _written_out_size(node: Any, known: dict[int, int]) -> int:
    """Return the number of values that a YAML node expands to, with each alias counted as its content."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.composer.ComposerError(None, None, "an alias is part of what it repeats", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0  # marks a node in progress: meeting it again means that it contains itself
    value = node.value if isinstance(node.value, list) else []
    parts = [part for entry in value for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = 1 + sum(_written_out_size(part, known) for part in parts)
    return known[id(node)]


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without YAML's surprises.

    No dates, no numbers in base 60, 16 or 8, no `no` for false, no tags of other types, no duplicate or non-string
    keys, no aliases that expand without limit or contain themselves.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _written_out_size(node, {}) > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"its aliases stand for more than {MOST_NODES:,} values")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be a text, and not a list", key.start_mark)
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"key {quoted(key.value)} comes twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_text(self, node: Any) -> str:
        """Return the text with surrogate pairs joined: JSON escapes characters above U+FFFF that way."""
        text: str = self.construct_scalar(node)
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def construct_plain(self, node: Any) -> Any:
        """Return a null, boolean or number."""
        text, kind = self.construct_scalar(node), node.tag.removeprefix(YAML_TAG)
        if not _PLAIN[kind].fullmatch(text):
            raise yaml.constructor.ConstructorError(None, None, f"{quoted(text)} is no {kind}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return self.construct_yaml_float(node)
        if len(text) > MOST_DIGITS:
            problem = f"an integer of {len(text)} digits; at most {MOST_DIGITS} are read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(text)


YAML_TAG = "tag:yaml.org,2002:"
# YAML 1.1 gives all of these a type, so PyYAML quotes text that looks like one and it survives a round trip.
_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": re.compile(
        r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
for _kind, _pattern in _PLAIN.items():
    _PlainLoader.add_implicit_resolver(YAML_TAG + _kind, re.compile(rf"(?:{_pattern.pattern})\Z"), None)
_PlainLoader.add_implicit_resolver(f"{YAML_TAG}merge", re.compile(r"<<\Z"), None)
_PlainLoader.yaml_constructors = {
    **{YAML_TAG + kind: _PlainLoader.construct_plain for kind in _PLAIN},
    f"{YAML_TAG}str": _PlainLoader.construct_text,
    f"{YAML_TAG}seq": _PlainLoader.construct_yaml_seq,
    f"{YAML_TAG}map": _PlainLoader.construct_yaml_map,
    None: _PlainLoader.construct_undefined,
}
