"""What one library reads of a model's folder and the other does not.

Libraries drop what they do not know in silence, so asking them is no use, and code that reads a key may do nothing with
it. So every key is changed, and a library uses it if its logits change, or if it then refuses the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.oracle import Array

Config = dict[str, Any]
Run = Callable[[Config], Array]  # logits under another config.json

# They say which code to run and where it came from, not what it computes.
NAMES = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map"}


@dataclass(frozen=True)
class Finding:
    """A key of config.json, dotted, that only one of the libraries uses."""

    key: str
    value: Any
    used_by: str
    ignored_by: str

    @property
    def said(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}"


def lint_config(config: Config, transformers: Run, mlx_lm: Run) -> list[Finding]:
    """Every key that changes the logits of one library only."""
    runs = {"transformers": transformers, "mlx-lm": mlx_lm}
    before = {name: run(config) for name, run in runs.items()}
    findings = []
    for path, value in leaves(config):
        for changed in (with_value(config, path, other) for other in others(value)):
            users = [name for name, run in runs.items() if _differs(run, changed, before[name])]
            if len(users) == 1:
                ignoring = next(name for name in runs if name not in users)
                findings.append(Finding(".".join(path), value, users[0], ignoring))
            if users:
                break
    return findings


def leaves(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that holds a value, and that value, but for names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        elif above or key not in NAMES:
            yield (*above, key), value


def others(value: Any) -> list[Any]:
    """Other values that a key might have; what is off stays so. Small ones show what acts on long texts only."""
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


def with_value(config: Config, path: Sequence[str], value: Any) -> Config:
    """A copy with another value; without the key, if that is `...`."""
    key, *rest = path
    if rest:
        return config | {key: with_value(config[key], rest, value)}
    return {name: old for name, old in config.items() if name != key} | ({} if value is ... else {key: value})


def repairs(config: Config, fields: Mapping[str, Any], nothing: Any, other: Callable[[str], Any]) -> Config:
    """What config.json could say to mlx-lm in its own words: of the `fields` that it looks for and does not find, and
    whose default is another, those whose value stands elsewhere in the file, or that it cannot do without and that
    transformers has a value for. `nothing` marks a field without a default.
    """
    nested = {path[-1]: value for path, value in leaves(config) if len(path) > 1}
    found = {}
    for name, default in fields.items():
        if name in config:
            continue
        value = nested.get(name, other(name) if default is nothing else None)
        if value is not None and value != default:
            found[name] = value
    return found


def _differs(run: Run, config: Config, before: Array) -> bool:
    try:
        return not np.array_equal(run(config), before, equal_nan=True)
    except Exception:  # whatever it is that the library makes of it, it has read the key
        return True
