"""Compare mlx-lm with transformers on any Hugging Face folder, and find the cause where they differ."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.errors import InputError
from mlx_moe.extras import require
from mlx_moe.hub.foreign import ForeignModel, check_all_finite, opened_for_library
from mlx_moe.storage.tensor_files import n_elements, sha256
from mlx_moe.training.backend import Tokens
from parity.config_key_usage import JsonConfig, find_key_usage, repairs, with_value
from parity.library_comparison import LibraryComparison, describe_error
from parity.report import KeyUsage, LibraryMeasurement, LibraryReport
from parity.small_models import SMALL_MODEL_PARAMETERS

SEQUENCES, TOKENS = 2, 128  # one sequence for more parameters than SMALL_MODEL_PARAMETERS
KEY_USAGE_TOKENS = 16
BYTES_PER_PARAMETER = 20  # float64, float32 in both libraries, and activations
NO_DEFAULT = inspect.Parameter.empty  # in place of a default
AGREEMENT = 8.0  # logits agree, in the search for a cause, up to this many times transformers' error


def compare_model(folder: Path, seed: int = 0) -> LibraryReport:
    """Open a folder with both libraries and compare them. Failures of a library are part of the report.

    Raises InputError for a folder that holds no model, brings code, is damaged or too large, or without a library.
    """
    _check_libraries()
    with opened_for_library(folder) as found:
        n_parameters = n_elements(found.tensors)
        _check_memory(folder, n_parameters)
        check_all_finite(found)
        return _compare(folder, found, n_parameters, seed)


def _compare(folder: Path, found: ForeignModel, n_parameters: int, seed: int) -> LibraryReport:
    config, hashes = found.config, {file.name: sha256(file) for file in found.files}
    report = LibraryReport(str(folder), str(config["model_type"]), n_parameters, sha256(folder / "config.json"), hashes)
    torch_library = importlib.import_module("parity.libraries.transformers")
    try:
        torch, exact = torch_library.LibraryModel(folder), torch_library.LibraryModel(folder, exact=True)
        comparison = LibraryComparison(torch, exact, _tokens(torch, n_parameters, seed))
    except InputError:
        raise
    except Exception as error:  # libraries raise anything
        return replace(report, problem=f"transformers fails with {describe_error(error)}")
    initialized = tuple(f"{name}: in no file, so transformers initializes it at random" for name in torch.missing)
    report = replace(report, parameters=initialized, margins=comparison.margins)
    return _FolderComparison(folder, config, torch, comparison).report(report)


class _FolderComparison:
    """Comparison of a folder that transformers can open."""

    def __init__(self, folder: Path, config: JsonConfig, torch: Any, comparison: LibraryComparison):
        self._folder, self._config, self._torch, self._comparison = folder, config, torch, comparison
        self._library = importlib.import_module("parity.libraries.mlx_lm")

    def report(self, report: LibraryReport) -> LibraryReport:
        try:
            fields = self._library.fields(self._folder)
        except Exception as error:  # libraries raise anything
            return replace(report, problem=f"mlx-lm does not know this model: {describe_error(error)}")
        repair = repairs(self._config, fields, NO_DEFAULT, self._torch.config_value)
        try:
            mlx = self._library.LibraryModel(self._folder)
            measured = self._comparison.measure(mlx)
        except InputError:
            raise
        except Exception as error:
            missing = [name for name, default in fields.items() if default is NO_DEFAULT and name not in self._config]
            lacks = f"; it needs {', '.join(missing)}, which config.json does not have" if missing else ""
            report = replace(report, problem=f"mlx-lm fails with {describe_error(error)}{lacks}")
            return replace(report, repair=self._try(repair)[0])
        dropped = set(mlx.dropped()) & self._torch.parameter_names()
        report = replace(
            report,
            measured=measured,
            key_usage=tuple(self._key_usage()),
            parameters=report.parameters + tuple(f"{name}: mlx-lm drops it" for name in sorted(dropped)),
        )
        if report.passed:
            return report
        words, repaired = self._try(repair)
        causes = tuple(self._causes(report.key_usage, fields, repair, measured, repaired))
        return replace(report, causes=causes, repair=words)

    def _key_usage(self) -> list[KeyUsage]:
        tokens_BT = self._comparison.tokens_BT[:1, :KEY_USAGE_TOKENS]
        return find_key_usage(
            self._config,
            lambda changed: self._torch.logits_with(changed, tokens_BT),
            lambda changed: self._library.LibraryModel(self._folder, changed).logits(tokens_BT),
        )

    def _try(self, repair: JsonConfig) -> tuple[str, LibraryMeasurement | None]:
        """Measure mlx-lm with the repair added to config.json. Return the result in words, and the measurement."""
        if not repair:
            return "", None
        added = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in repair.items())
        try:
            measured = self._comparison.measure(self._library.LibraryModel(self._folder, repair), by_module=False)
        except Exception as error:
            return f"with {added} in config.json, mlx-lm fails with {describe_error(error)}", None
        return f"with {added} in config.json, it {'passes' if measured.passed else 'still differs'}", measured

    def _causes(
        self,
        key_usage: Sequence[KeyUsage],
        fields: JsonConfig,
        repair: JsonConfig,
        measured: LibraryMeasurement,
        repaired: LibraryMeasurement | None,
    ) -> Iterator[str]:
        """Yield keys whose value under mlx-lm's name repairs it, or without which transformers agrees with it."""
        ignored = [usage for usage in key_usage if usage.ignored_by == "mlx-lm"]
        if repaired and repaired.passed:
            for usage in ignored:
                if (leaf := usage.key.rpartition(".")[2]) in repair:
                    yield f"{usage.assignment}: mlx-lm does not read it, and takes {fields[leaf]}"
            return
        differ = [found for found in (measured, repaired) if found]
        for usage in ignored:
            if (distance := self._distance_without(usage, differ)) is not None:
                yield f"{usage.assignment}: mlx-lm ignores it; without it, they agree to {distance:.0e}"

    def _distance_without(self, usage: KeyUsage, differ: Sequence[LibraryMeasurement]) -> float | None:
        """Return the RMSE between mlx-lm and transformers without a key, if rounding explains it; else None."""
        for nothing in (..., None):
            try:
                config = with_value(self._config, usage.key.split("."), nothing)
                without_BTV = self._torch.logits_with(config, self._comparison.tokens_BT)
            except Exception:  # the key is required
                continue
            for found in differ:
                rmse = float(np.sqrt(np.square(found.logits_BTV - without_BTV).mean()))
                if rmse <= AGREEMENT * self._comparison.logits.float32.rmse:
                    return rmse
        return None


def _check_libraries() -> None:
    for library in ("torch", "transformers", "mlx", "mlx_lm"):
        require(library, "mlxmoe parity --model")


def _check_memory(folder: Path, n_parameters: int) -> None:
    needed, there = BYTES_PER_PARAMETER * n_parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise InputError(
            f"{folder}: the reference of {n_parameters / 1e9:.1f} B parameters takes {needed >> 30} GiB, and this "
            f"machine has {there >> 30}; take a larger one, or a smaller model of the family"
        )


def _tokens(torch: Any, n_parameters: int, seed: int) -> Tokens:
    longest = torch.config_value("max_position_embeddings") or TOKENS
    shape = (SEQUENCES if n_parameters <= SMALL_MODEL_PARAMETERS else 1, min(TOKENS, longest))
    return np.random.default_rng(seed).integers(0, torch.config_value("vocab_size"), shape).astype(np.int32)
