"""Find the keys of config.json that only one of two libraries uses.

Libraries silently drop keys they do not know, and code that reads a key may do nothing with it. So every key is changed
in turn: a library uses a key if its logits change, or if it then refuses the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity.numpy_model import Array
from parity.report import KeyUsage

JsonConfig = dict[str, Any]
Run = Callable[[JsonConfig], Array]  # logits under another config.json

# Keys that say which code to run and where a model came from, not what it computes.
NAMES = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map"}


def find_key_usage(config: JsonConfig, transformers: Run, mlx_lm: Run) -> list[KeyUsage]:
    """Return every key that changes the logits of one library only."""
    runs = {"transformers": transformers, "mlx-lm": mlx_lm}
    before = {name: run(config) for name, run in runs.items()}
    found = []
    for path, value in leaves(config):
        for changed in (with_value(config, path, other) for other in alternatives(value)):
            users = [name for name, run in runs.items() if _differs(run, changed, before[name])]
            if len(users) == 1:
                ignoring = next(name for name in runs if name not in users)
                found.append(KeyUsage(".".join(path), value, users[0], ignoring))
            if users:
                break
    return found


def leaves(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every key that holds a plain value, except `NAMES`."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        elif above or key not in NAMES:
            yield (*above, key), value


def alternatives(value: Any) -> list[Any]:
    """Return other values for a key; none for null. Small numbers expose keys that only affect long texts."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in (value + 1, value // 2, 2) if other != value]
    if isinstance(value, float):
        return [1.5 * value] if value else [0.5]
    if isinstance(value, str):
        return [other for other in ("relu", "silu") if other != value]
    if isinstance(value, list) and value:
        return [value[::-1]] if value[::-1] != value else [value[:-1]]
    return []


def with_value(config: JsonConfig, path: Sequence[str], value: Any) -> JsonConfig:
    """Return a copy with another value at `path`, or without the key if the value is `...`."""
    key, *rest = path
    if rest:
        return config | {key: with_value(config[key], rest, value)}
    return {name: old for name, old in config.items() if name != key} | ({} if value is ... else {key: value})


def repairs(config: JsonConfig, fields: Mapping[str, Any], required: Any, value_of: Callable[[str], Any]) -> JsonConfig:
    """Return what to add to config.json so that mlx-lm reads the values under its own names.

    `fields` maps the keys that mlx-lm looks for to their defaults; `required` marks a field without a default. A field
    is added if config.json lacks it, its value stands elsewhere in the file, and its default is another value. A
    required field takes `value_of(field)`, transformers' value.
    """
    nested = {path[-1]: value for path, value in leaves(config) if len(path) > 1}
    found = {}
    for name, default in fields.items():
        if name in config:
            continue
        value = nested.get(name, value_of(name) if default is required else None)
        if value is not None and value != default:
            found[name] = value
    return found


def _differs(run: Run, config: JsonConfig, before: Array) -> bool:
    try:
        return not np.array_equal(run(config), before, equal_nan=True)
    except Exception:  # a library that raises anything has read the key
        return True
