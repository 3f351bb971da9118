"""What users write, checked against a model: every fault is one line that says where and why."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mlx_moe.errors import InputError

Config = TypeVar("Config")


def validate(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build a config (a model or a dataclass), or raise InputError with one line for every fault."""
    try:
        return _adapter(kind).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
        raise InputError("\n".join(_explain(kind, fault) for fault in faults)) from None


@cache
def _adapter(kind: type[Config]) -> TypeAdapter[Config]:
    return TypeAdapter(kind)


def by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their `key.path`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= by_path(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """`did you mean …? `, or nothing where no known name is near."""
    match = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {match[0]!r}? " if match else ""


def _explain(kind: type[Any], fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        section: Any = kind
        for part in path[:-1]:
            annotation = section.model_fields[part].annotation
            section = next(t for t in (annotation, *getattr(annotation, "__args__", ())) if hasattr(t, "model_fields"))
        fields = list(section.model_fields)
        hint = nearest(path[-1], fields)
        return f"unknown key {'.'.join(path)!r}; {hint}known here: {', '.join(fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("value_error", "missing") and isinstance(fault["input"], dict):  # about a section as a whole
        return f"{'.'.join(path)}: {message}" if path else message
    return f"{'.'.join(path)} = {fault['input']!r}: {message[0].lower()}{message[1:]}"
