"""Any model in Hugging Face's folder: mlx-lm against transformers, and why they differ."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_moe.errors import InputError
from mlx_moe.hub.foreign import ForeignModel, check_all_finite, opened_for_library
from mlx_moe.storage.tensor_files import n_elements, sha256
from mlx_moe.training.backend import BackendName, Tokens, is_installed
from parity.library_bench import Bench, Measured, said
from parity.lint import Config, Finding, lint_config, repairs, with_value

SEQUENCES, TOKENS = 2, 128  # one sequence for more parameters than SMALL
SMALL = 2_000_000
LINT_TOKENS = 16
BYTES_PER_PARAMETER = 20  # in float64 and, in both libraries, in float32; and some
REQUIRED = inspect.Parameter.empty  # in place of a default
SAME = 8.0  # logits no further apart than so many times transformers' error are the same, in search of a cause


@dataclass(frozen=True)
class Report:
    """What became of one folder."""

    folder: str
    model_type: str
    n_parameters: int
    config_sha256: str
    weights_sha256: dict[str, str]
    problem: str = ""  # why nothing was judged
    measured: Measured | None = None
    margins: tuple[float, ...] = ()
    findings: tuple[Finding, ...] = ()
    parameters: tuple[str, ...] = ()  # tensors that one library drops, or makes up
    causes: tuple[str, ...] = ()
    repair: str = ""  # what to add to config.json

    @property
    def passed(self) -> bool | None:
        """None where there was nothing to judge."""
        return None if self.problem or self.measured is None else self.measured.passed and not self.parameters

    @property
    def exit_code(self) -> int:
        return {True: 0, False: 1, None: 2}[self.passed]


def compare_model(folder: Path, seed: int = 0) -> Report:
    """Open a folder with both libraries and compare. Whatever they cannot do is in the report.

    Raises InputError where it is no model's folder, brings code, is damaged or too large, or a library is not here.
    """
    _check_libraries()
    with opened_for_library(folder) as found:
        n_parameters = n_elements(found.tensors)
        _check_memory(folder, n_parameters)
        check_all_finite(found)
        return _compare(folder, found, n_parameters, seed)


def _compare(folder: Path, found: ForeignModel, n_parameters: int, seed: int) -> Report:
    config, hashes = found.config, {file.name: sha256(file) for file in found.files}
    report = Report(str(folder), str(config["model_type"]), n_parameters, sha256(folder / "config.json"), hashes)
    torch_library = importlib.import_module("parity.libraries.transformers")
    try:
        torch, exact = torch_library.LibraryModel(folder), torch_library.LibraryModel(folder, exact=True)
        bench = Bench(torch, exact, _tokens(torch, n_parameters, seed))
    except InputError:
        raise
    except Exception as error:  # whatever a library cannot do
        return replace(report, problem=f"transformers fails with {said(error)}")
    made_up = tuple(f"{name}: in no file, so transformers draws it at random" for name in torch.missing)
    report = replace(report, parameters=made_up, margins=bench.margins)
    return _Comparison(folder, config, torch, bench).report(report)


class _Comparison:
    """A folder that transformers could open."""

    def __init__(self, folder: Path, config: Config, torch: Any, bench: Bench):
        self._folder, self._config, self._torch, self._bench = folder, config, torch, bench
        self._library = importlib.import_module("parity.libraries.mlx_lm")

    def report(self, report: Report) -> Report:
        try:
            fields = self._library.fields(self._folder)
        except Exception as error:  # whatever a library cannot do
            return replace(report, problem=f"mlx-lm does not know this model: {said(error)}")
        repair = repairs(self._config, fields, REQUIRED, self._torch.config_value)
        try:
            mlx = self._library.LibraryModel(self._folder)
            measured = self._bench.measure(mlx)
        except InputError:
            raise
        except Exception as error:
            missing = [name for name, default in fields.items() if default is REQUIRED and name not in self._config]
            lacks = f"; it needs {', '.join(missing)}, which config.json does not have" if missing else ""
            report = replace(report, problem=f"mlx-lm fails with {said(error)}{lacks}")
            return replace(report, repair=self._try(repair)[0])
        dropped = set(mlx.dropped()) & self._torch.parameter_names()
        report = replace(
            report,
            measured=measured,
            findings=tuple(self._lint()),
            parameters=report.parameters + tuple(f"{name}: mlx-lm drops it" for name in sorted(dropped)),
        )
        if report.passed:
            return report
        words, repaired = self._try(repair)
        causes = tuple(self._causes(report.findings, fields, repair, measured, repaired))
        return replace(report, causes=causes, repair=words)

    def _lint(self) -> list[Finding]:
        tokens_BT = self._bench.tokens_BT[:1, :LINT_TOKENS]
        return lint_config(
            self._config,
            lambda changed: self._torch.logits_with(changed, tokens_BT),
            lambda changed: self._library.LibraryModel(self._folder, changed).logits(tokens_BT),
        )

    def _try(self, repair: Config) -> tuple[str, Measured | None]:
        """What mlx-lm makes of the folder if config.json says in its words what it says in others; in words, too."""
        if not repair:
            return "", None
        added = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in repair.items())
        try:
            measured = self._bench.measure(self._library.LibraryModel(self._folder, repair), by_module=False)
        except Exception as error:
            return f"with {added} in config.json, mlx-lm fails with {said(error)}", None
        return f"with {added} in config.json, it {'passes' if measured.passed else 'still differs'}", measured

    def _causes(
        self, findings: Sequence[Finding], fields: Config, repair: Config, measured: Measured, repaired: Measured | None
    ) -> Iterator[str]:
        """Keys whose value, said in mlx-lm's words, repairs it; and those without which transformers agrees with it."""
        ignored = [finding for finding in findings if finding.ignored_by == "mlx-lm"]
        if repaired and repaired.passed:
            for finding in ignored:
                if (leaf := finding.key.rpartition(".")[2]) in repair:
                    yield f"{finding.said}: mlx-lm does not read it, and takes {fields[leaf]}"
            return
        differ = [found for found in (measured, repaired) if found]
        for finding in ignored:
            if (distance := self._distance_without(finding, differ)) is not None:
                yield f"{finding.said}: mlx-lm ignores it; without it, they agree to {distance:.0e}"

    def _distance_without(self, finding: Finding, differ: Sequence[Measured]) -> float | None:
        """RMSE between mlx-lm and transformers that does not have a key, either, if that is no more than rounding."""
        for nothing in (..., None):
            try:
                config = with_value(self._config, finding.key.split("."), nothing)
                without_BTV = self._torch.logits_with(config, self._bench.tokens_BT)
            except Exception:  # it cannot do without
                continue
            for found in differ:
                rmse = float(np.sqrt(np.square(found.logits_BTV - without_BTV).mean()))
                if rmse <= SAME * self._bench.logits.float32.rmse:
                    return rmse
        return None


def _check_libraries() -> None:
    libraries: dict[BackendName, str] = {"torch": "transformers", "mlx": "mlx_lm"}
    for name, library in libraries.items():
        if not is_installed(name) or importlib.util.find_spec(library) is None:
            raise InputError(f"--model needs transformers with torch and mlx-lm with mlx: no {name} or {library} here")


def _check_memory(folder: Path, n_parameters: int) -> None:
    needed, there = BYTES_PER_PARAMETER * n_parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise InputError(
            f"{folder}: the truth of {n_parameters / 1e9:.1f} B parameters takes {needed >> 30} GiB, and this machine "
            f"has {there >> 30}; take a larger one, or a smaller model of the family"
        )


def _tokens(torch: Any, n_parameters: int, seed: int) -> Tokens:
    longest = torch.config_value("max_position_embeddings") or TOKENS
    shape = (SEQUENCES if n_parameters <= SMALL else 1, min(TOKENS, longest))
    return np.random.default_rng(seed).integers(0, torch.config_value("vocab_size"), shape).astype(np.int32)
