"""Presets of runs and architectures, and the settings merged over them.

Precedence: preset < file < `-o key=value`. An architecture preset lies below all of them and fills in what the `model`
section omits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.data.sources import BUILTIN
from mlx_moe.errors import InputError, quoted
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.reading import check_values, is_unicode, parse_yaml, read_mapping
from mlx_moe.validation import nearest, validate

FOLDER = Path(__file__).parent
MAX_DEPTH = 8  # dots in a key path; the deepest key has two


def preset_names(kind: Literal["architectures", "runs"]) -> list[str]:
    return sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))


def load_run(
    preset: str = "three-phase",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    fixed_by_model: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return the merged config of a run: preset < file < overrides (`key.path=value`, the value read as YAML).

    For a path, all documents are used: a preset's `data.n_documents` applies only to the built-in sources.

    A file or preset that names the transfer of a phase lists all phases of the run, in order; omitted settings come
    from the preset below. Otherwise it changes existing phases. `phases.NAME=null` drops a phase,
    `phases.NAME.transfer=grow` appends one. `steps` applies to every phase whose steps no override sets.

    `preset` names a run, or an architecture, which is used in the `three-phase` run. `fixed_by_model` holds what a
    starting model determines, including its whole `model` section, and replaces the preset's values.

    Raises InputError with the key, the value, the limit and the closest valid key.
    """
    if preset in preset_names("architectures"):
        layers = [_read_preset("runs", "three-phase"), {"model": {"architecture": preset}}]
    else:
        layers = [_read_preset("runs", preset)]
    if fixed_by_model is not None:
        layers[0].pop("model", None)
        layers.insert(1, dict(fixed_by_model))
    files = [] if file is None else [read_mapping(absolute(file))]
    parsed = [_parse_override(text) for text in overrides]
    if any(map(_names_a_path, [*files, *parsed])):
        layers.append({"data": {"n_documents": None}})
    merged: dict[str, Any] = {}
    for layer in [*layers, *files]:
        if _lists_phases(layer):
            below = merged.pop("phases", {})
            layer = layer | {"phases": {name: _merged(below.get(name), own) for name, own in layer["phases"].items()}}
        _merge(merged, layer)
    for layer in parsed:
        _merge(merged, layer)
    if isinstance(merged.get("phases"), dict):
        merged["phases"] = _known_phases(merged["phases"], layers, files, parsed)
        _set_steps(merged["phases"], parsed, steps)
    if fixed_by_model is not None:
        merged["start"] = fixed_by_model["start"]
    model = merged.setdefault("model", {})
    if isinstance(model, dict):
        if "vocab_size" in model and isinstance(merged.setdefault("data", {}), dict):
            merged["data"]["fit_vocabulary"] = False
        if merged.get("start") is None:
            merged["model"] = _read_preset("architectures", model.get("architecture", "simple")) | model
    return validate(RunConfig, merged)


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a config's values with overrides (`key.path=value`) merged over them. Raises InputError."""
    merged: dict[str, Any] = json.loads(json.dumps(values))
    for text in overrides:
        _merge(merged, _parse_override(text))
    return merged


def load_architecture(name: str, **overrides: Any) -> ModelConfig:
    """Return an architecture preset, with fields replaced."""
    return validate(ModelConfig, _read_preset("architectures", name) | overrides)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `key.path=value` for `load_run`. Raises InputError for text, such as a path, that is not UTF-8."""
    for key, value in values.items():
        if isinstance(value, str) and not is_unicode(value):
            raise InputError(f"{key} {quoted(value)} is not UTF-8, as a config must be; rename it")

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Path):
            return str(value)
        raise InputError(f"a config has numbers, text and lists, not {type(value).__name__}: {quoted(value)}")

    return [f"{key}={json.dumps(value, default=plain)}" for key, value in values.items()]


def _read_preset(kind: Literal["architectures", "runs"], name: Any) -> dict[str, Any]:
    known = preset_names(kind) + (preset_names("architectures") if kind == "runs" else [])
    if name not in known:
        raise InputError(f"no preset named {quoted(name)}; {nearest(str(name), known)}known: {', '.join(known)}")
    return read_mapping(FOLDER / kind / f"{name}.yaml")


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not path or path.count(".") > MAX_DEPTH:
        raise InputError(f"override {quoted(text)} is not of the form key.path=value, e.g. model.n_layers=4")
    nested: Any = parse_yaml(value, f"override {quoted(text)}: the value {quoted(value)}")
    for key in reversed(path.split(".")):
        nested = {key: nested}
    check_values(nested, f"override {quoted(text)}")
    return nested


def _names_a_path(layer: Mapping[str, Any]) -> bool:
    data = layer.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    return isinstance(source, str) and source not in BUILTIN


def _lists_phases(layer: Mapping[str, Any]) -> bool:
    """Return whether a layer lists all phases of a run, which it does if it names a transfer."""
    phases = layer.get("phases")
    return isinstance(phases, dict) and any(isinstance(own, dict) and own.get("transfer") for own in phases.values())


def _known_phases(phases: dict[str, Any], *origins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the phases that were not dropped.

    Raises InputError for a phase that no layer lists and that has no transfer: its name is misspelt.
    """
    listed: dict[str, Any] = {}
    for layer in (layer for layers in origins for layer in layers if _lists_phases(layer)):
        listed |= layer["phases"]
    kept = {name: own for name, own in phases.items() if own is not None}
    for name, own in phases.items():
        is_new = isinstance(own, dict) and own.get("transfer")
        if listed and name not in listed and not is_new:
            raise InputError(
                f"no phase {quoted(name)} in the run; {nearest(str(name), list(listed))}its phases: "
                f"{', '.join(map(str, listed))}; a new one needs its transfer: -o phases.NAME.transfer=grow"
            )
    return kept


def _set_steps(phases: dict[str, Any], overrides: Sequence[Mapping[str, Any]], steps: int | None) -> None:
    """Set the steps of every phase whose steps no override sets."""
    for name, own in phases.items() if steps is not None else ():
        named = [layer["phases"].get(name) for layer in overrides if isinstance(layer.get("phases"), dict)]
        if isinstance(own, dict) and not any(isinstance(values, dict) and "steps" in values for values in named):
            own["steps"] = steps


def _merged(below: Any, own: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(own, dict):
        return own
    if below.get("transfer") != own.get("transfer"):  # settings of another transfer do not apply
        return own
    both = dict(below)
    _merge(both, own)
    return both


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
