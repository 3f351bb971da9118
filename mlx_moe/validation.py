"""Validation of user input by pydantic models; every fault becomes one line with its key and reason."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import Tag, TypeAdapter, ValidationError

from mlx_moe.errors import MAX_QUOTED, InputError, quoted

Config = TypeVar("Config")
MAX_FAULTS = 5  # listed in one message
TAG = "\0"  # prefix of the tag of a union's member; no key begins with it


def validate(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build a config (a model or a dataclass), or raise InputError with one line per fault."""
    try:
        return _adapter(kind).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
        lines = [_explain(kind, fault) for fault in faults[:MAX_FAULTS]]
        more = [f"and {len(faults) - MAX_FAULTS:,} more"] if len(faults) > MAX_FAULTS else []
        raise InputError(*lines, *more) from None


@cache
def _adapter(kind: type[Config]) -> TypeAdapter[Config]:
    return TypeAdapter(kind)


def tag(name: str) -> str:
    """Mark the name of a member of a discriminated union, so that messages can leave it out of key paths."""
    return f"{TAG}{name}"


def by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to `key.path`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= by_path(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """Return `did you mean …? `, or an empty string if no known name is close."""
    match = get_close_matches(name[:MAX_QUOTED], known, n=1, cutoff=cutoff)
    return f"did you mean {match[0]!r}? " if match else ""


def _explain(kind: type[Any], fault: Any) -> str:
    hidden = {part for part in map(str, fault["loc"]) if part.startswith(TAG) or part == "[key]"}
    path = ".".join(_shortened(str(part)) for part in fault["loc"] if str(part) not in hidden)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(kind, fault["loc"][:-1])
        hint = nearest(str(fault["loc"][-1]), known)
        return f"unknown key {path!r}" + (f"; {hint}known here: {', '.join(known)}" if known else "; leave it out")
    if fault["type"] == "invalid_key":
        return f"{path}: keys should be strings, and this is {quoted(fault['input'])}; quote it"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "too_short":
        message = f"must have at least {fault['ctx']['min_length']} of them"
    elif fault["type"] == "too_long":
        message = f"must have at most {fault['ctx']['max_length']} of them"
    elif fault["type"] == "less_than_equal":
        message = f"must be at most {fault['ctx']['le']:.15g}"
    elif fault["type"] == "greater_than_equal":  # pydantic writes 1e-30 with all its zeros
        message = f"must be greater than or equal to {fault['ctx']['ge']:.15g}"
    if fault["type"] in ("value_error", "missing") and isinstance(fault["input"], dict):  # faults of a whole section
        return f"{path}: {message}" if path else message
    return f"{path} = {quoted(fault['input'])}: {message[0].lower()}{message[1:]}"


def _known_keys(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Return the keys of the section at a path; none if that is not a model."""
    for part in path:
        kind = _part_of(kind, part)
    kind = next((option for option in (kind, *get_args(kind)) if hasattr(option, "model_fields")), None)
    return list(getattr(kind, "model_fields", {}))


def _part_of(kind: Any, part: str | int) -> Any:
    """Return the annotation at one part of a key path, in a model, a mapping or a tagged union."""
    options = [kind, *get_args(kind)]
    if str(part).startswith(TAG):
        return next((option for option in _members(kind) if Tag(str(part)) in get_args(option)[1:]), None)
    for option in options:
        if part in getattr(option, "model_fields", {}):
            return option.model_fields[part].annotation
    return get_args(kind)[-1] if get_origin(kind) is dict else None


def _members(union: Any) -> list[Any]:
    return [member for option in get_args(union) for member in (option, *get_args(option))]


def _shortened(key: str) -> str:
    return key if len(key) <= MAX_QUOTED else f"{key[: MAX_QUOTED - 1]}…"
