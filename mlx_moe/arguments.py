"""Arguments of the public functions, checked by their annotations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BeforeValidator, Field, InstanceOf, TypeAdapter, ValidationError

from mlx_moe.architecture import Real, Whole
from mlx_moe.errors import InputError, quoted
from mlx_moe.limits import MAX_SEED

P = ParamSpec("P")
Result = TypeVar("Result")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


Integer = Annotated[Whole, BeforeValidator(_plain)]
Number = Annotated[Real, BeforeValidator(_plain)]
Seed = Annotated[Integer, Field(ge=0, le=MAX_SEED)]
TAKEN_BY_PYDANTIC = (str, bool, Path, NoneType)


def checked(*unchecked: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Make a function raise InputError, one line per fault, for arguments of other types than its annotations say.

    NumPy's numbers become Python's. A `seed` is from 0 to 2⁶³ - 1. `unchecked` are arguments that the function checks
    itself.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        signature = inspect.signature(function)

        @cache
        def adapters() -> dict[str, TypeAdapter[Any]]:
            hints = {
                name: parameter.annotation
                for name, parameter in signature.parameters.items()
                if name not in (*unchecked, "self") and parameter.kind is not parameter.VAR_KEYWORD
            }
            holder = SimpleNamespace(__annotations__=hints)
            kinds = get_type_hints(holder, function.__globals__, include_extras=True)
            return {name: _adapter(Seed if name == "seed" else kind) for name, kind in kinds.items()}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            bound = signature.bind(*args, **kwargs)
            faults = []
            for name, adapter in adapters().items():
                if name in bound.arguments:
                    try:
                        bound.arguments[name] = adapter.validate_python(bound.arguments[name])
                    except ValidationError as error:
                        faults.append(_explain(name, bound.arguments[name], error))
            if faults:
                raise InputError(*faults)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _adapter(kind: Any) -> TypeAdapter[Any]:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    annotation: Any = Union[tuple(map(_annotation, parts))]  # noqa: UP007
    return TypeAdapter(annotation)


def _annotation(kind: Any) -> Any:
    if kind in (int, float):
        return Integer if kind is int else Number
    is_class = isinstance(kind, type) and kind not in TAKEN_BY_PYDANTIC
    return Annotated[kind, InstanceOf()] if is_class else kind


def _explain(name: str, value: Any, error: ValidationError) -> str:
    """Say in one line what is wrong with an argument; of a union, what any of its members would take."""
    faults = error.errors()
    messages = dict.fromkeys(map(_wanted, faults))
    places = [part for part in faults[0]["loc"] if isinstance(part, int)]
    place = "".join(f"[{part}]" for part in places)
    shown = faults[0]["input"] if places else value
    return f"{name}{place} = {quoted(shown)}: must be {' or '.join(messages)}"


def _wanted(fault: Any) -> str:
    if fault["type"] == "path_type":
        return "a path"
    return re.sub("^(Value error, )?(Input should|must) be ", "", fault["msg"])
