"""Runs and architectures by name, and what a user lays over them.

Precedence: preset < file < `-o key=value`. An architecture preset stands under all of them: it fills in whatever
the `model` section leaves open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlx_moe.config import ModelConfig, RunConfig
from mlx_moe.data.sources import BUILTIN
from mlx_moe.errors import InputError, quoted
from mlx_moe.storage.atomic import absolute
from mlx_moe.storage.reading import check_values, is_unicode, parse_yaml, read_mapping
from mlx_moe.validation import nearest, validate

FOLDER = Path(__file__).parent
MAX_DEPTH = 8  # dots in a key path; the deepest key there is has two


def preset_names(kind: Literal["architectures", "runs"]) -> list[str]:
    return sorted(path.stem for path in (FOLDER / kind).glob("*.yaml"))


def load_run(
    preset: str = "three-phase",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    settled: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The merged config of a run: preset < file < overrides (`key.path=value`, the value read as YAML).

    All documents of a path are taken: a preset's `data.n_documents` counts for the sources that come with us.

    `preset` names a run, or an architecture, which then stands in the `three-phase` run. `settled` is what a model to
    start from says, its whole `model` section among it: it takes the place of the preset's.

    Raises InputError, which names the key, the value, the limit and the nearest valid key.
    """
    if preset in preset_names("architectures"):
        layers = [_read_preset("runs", "three-phase"), {"model": {"architecture": preset}}]
    else:
        layers = [_read_preset("runs", preset)]
    if settled is not None:
        layers[0].pop("model", None)
        layers.insert(1, dict(settled))
    given = [] if file is None else [read_mapping(absolute(file))]
    given += [_parse_override(text) for text in overrides]
    if any(map(_names_a_path, given)):
        layers.append({"data": {"n_documents": None}})
    layers += given
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    if settled is not None:
        merged["start"] = settled["start"]
    model = merged.setdefault("model", {})
    if isinstance(model, dict):
        if "vocab_size" in model and isinstance(merged.setdefault("data", {}), dict):
            merged["data"]["fit_vocabulary"] = False
        if merged.get("start") is None:
            merged["model"] = _read_preset("architectures", model.get("architecture", "simple")) | model
    return validate(RunConfig, merged)


def load_architecture(name: str, **overrides: Any) -> ModelConfig:
    """An architecture preset, with fields replaced."""
    return validate(ModelConfig, _read_preset("architectures", name) | overrides)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """`key.path=value` for `load_run`. Raises InputError for a text, as a path may be, that is not UTF-8."""
    for key, value in values.items():
        if isinstance(value, str) and not is_unicode(value):
            raise InputError(f"{key} {quoted(value)} is not UTF-8, as a config must be; rename it")
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


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


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
