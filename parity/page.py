"""Render a parity report as one HTML page that opens without a network. Its template is `page.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_moe.html.render import render_page
from parity.charts import ErrorGrowth, MarginStrip, error_growth, margin_strips, margin_ticks
from parity.compare import LIMITS
from parity.report import (
    LibraryReport,
    LibraryTensorVerdict,
    ModelComparison,
    ParityReport,
    Scope,
    SelfTest,
    TensorError,
    TensorVerdict,
    agreement,
    tensors_by_scope,
)
from parity.tolerances import TO_FLOAT32, TO_OTHER, TO_OTHER_IN_HALF

# Headings of the tables, and how their tensors are computed.
SECTIONS: dict[Scope, tuple[str, str]] = {
    "module": ("Modules", "each fed the reference's input"),
    "model": ("Whole model", "router logits and logits"),
    "decode": ("Decoding", "logits with a cache, in chunks, and row by row"),
    "train": ("Training step", "every gradient, and every weight after a step of AdamW"),
    "half": ("Half precision", "every gradient, with products in bfloat16 and float16"),
}
HEAT = (1.5, 2.0)  # ratios from which a cell is tinted, in two steps


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `tint` names its colour."""

    text: str
    tint: str = ""


@dataclass(frozen=True)
class TensorRow:
    """A tensor with its figures, and what is wrong with it, if anything."""

    name: str
    cells: tuple[Cell, ...]
    passed: bool
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorTable:
    """Table of all tensors of a scope."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[TensorRow, ...]
    summary: str

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class ModelSection:
    """Compared model: a row of the overview, and its details."""

    anchor: str
    comparison: ModelComparison
    cells: tuple[Cell, ...]
    growth: ErrorGrowth | None
    strips: list[MarginStrip]
    tables: list[TensorTable]

    @property
    def first_failed(self) -> TensorTable | None:
        return next((table for table in self.tables if not table.passed), None)


@dataclass(frozen=True)
class LibrarySection:
    """Comparison of mlx-lm with transformers."""

    library: LibraryReport
    tables: list[TensorTable]
    growth: ErrorGrowth | None


def render(report: ParityReport) -> str:
    """Return the page; all text is escaped.

    Raises ValueError where a tensor has a scope that `report.tensors_by_scope` does not know.
    """
    return render_page(
        Path(__file__).parent,
        "page.html",
        title=_title(report),
        report=report,
        tiles=_tiles(report),
        models=[_model(f"model-{i}", comparison) for i, comparison in enumerate(report.comparisons)],
        library=_library(report.library) if report.library else None,
        self_test=report.self_test,
        margin_ticks=margin_ticks(),
        limits={"other": TO_OTHER, "float32": TO_FLOAT32, "half": TO_OTHER_IN_HALF, "boundary": LIMITS},
        versions=", ".join(f"{name} {version}" for name, version in report.libraries.items() if version),
    )


def _title(report: ParityReport) -> str:
    if report.library is None:
        return agreement(report.comparisons)
    name = Path(report.library.folder).name
    return {
        True: f"{name}: mlx-lm agrees with transformers",
        False: f"{name}: mlx-lm differs from transformers",
        None: f"{name}: not judged",
    }[report.library.passed]


def _tiles(report: ParityReport) -> list[tuple[str, str, str]]:
    """Return the page's headline figures: (name, value, note)."""
    tiles = []
    tensors = [tensor for each in report.comparisons if each.verdict for tensor in each.verdict.tensors]
    if tensors:
        passed, worst = sum(tensor.passed for tensor in tensors), max(tensors, key=lambda tensor: tensor.ratio_to_other)
        tiles.append(("Tensors within tolerance", f"{passed:,}", f"of {len(tensors):,} judged"))
        tiles.append(
            ("Largest ratio", _ratio(worst.ratio_to_other), f"of one backend's RMSE to the other's: {worst.name}")
        )
    if claims := [claim for each in report.comparisons for claim in each.claims]:
        tiles.append(("Transfer claims", f"{sum(claim.passed for claim in claims)} of {len(claims)}", "hold"))
    if report.library and (measured := report.library.measured):
        differing = sum(not module.passed for module in measured.modules)
        tiles.append(("Modules that differ", str(differing), f"of {len(measured.modules)} by the same name"))
        tiles.append(("Positions judged", f"{measured.judged:,}", "in every way of running the model"))
        tiles.append(("Same likeliest token", f"{100 * measured.top1_agreement:.2f} %", f"KL {measured.kl:.0e} nats"))
    if report.self_test:
        tiles.append(("Mutation score", f"{report.self_test.score:.0f} %", _caught(report.self_test)))
    return tiles


def _caught(self_test: SelfTest) -> str:
    return f"{self_test.n_caught} of {len(self_test.outcomes)} known faults found"


def _model(anchor: str, comparison: ModelComparison) -> ModelSection:
    verdict = comparison.verdict
    difference = comparison.boundary_difference
    cells = [Cell("")] * 5
    if verdict:
        logits = verdict.logits
        mlx, torch, float32, floor = map(_error, (logits.mlx, logits.torch, logits.float32, logits.floor))
        ratio = max(verdict.logits_ratio, logits.torch.ratios_to(logits.mlx, logits.floor)[0])
        cells = [mlx, torch, _tinted(ratio, logits.passed, f"{verdict.logits_ratio:.2f}"), float32, floor]
    ties = "*" if comparison.has_boundary_ties else ""
    return ModelSection(
        anchor=anchor,
        comparison=comparison,
        cells=(*cells, Cell("" if difference is None else f"{_number(difference)}{ties}")),
        growth=error_growth(verdict.propagated) if verdict else None,
        strips=margin_strips(verdict.margins) if verdict else [],
        tables=_tables(comparison) if verdict else [],
    )


def _tables(comparison: ModelComparison) -> list[TensorTable]:
    """Return a table for every scope that has tensors."""
    verdict = comparison.verdict
    assert verdict is not None
    tables = []
    for scope, tensors in tensors_by_scope(verdict.tensors).items():
        if not tensors:
            continue
        title, note = SECTIONS[scope]
        columns = ["MLX", "PyTorch", "float32", "ratio to other", "ratio to float32"]
        rows = [_tensor_row(tensor) for tensor in tensors]
        if scope == "module":
            columns += ["MLX so far", "PyTorch so far"]
            rows = [
                TensorRow(row.name, (*row.cells, *map(_error, verdict.propagated[row.name])), row.passed, row.faults)
                if row.name in verdict.propagated
                else TensorRow(row.name, (*row.cells, Cell("–"), Cell("–")), row.passed, row.faults)
                for row in rows
            ]
        worst = max(tensor.ratio_to_other for tensor in tensors)
        tables.append(TensorTable(title, note, tuple(columns), tuple(rows), _summary(rows, worst)))
    return tables


def _tensor_row(tensor: TensorVerdict) -> TensorRow:
    errors = [_error(error) for error in (tensor.mlx, tensor.torch, tensor.float32)]
    # Half precision is not judged by float32's error.
    to_float32 = Cell("–") if tensor.scope == "half" else _tinted(tensor.ratio_to_float32, tensor.passed)
    cells = (*errors, _tinted(tensor.ratio_to_other, tensor.passed), to_float32)
    return TensorRow(tensor.name, cells, tensor.passed, tensor.faults)


def _library(library: LibraryReport) -> LibrarySection:
    measured = library.measured
    if measured is None:
        return LibrarySection(library, [], None)
    columns = ("mlx-lm", "transformers", "floor", "ratio", "largest")
    tables = []
    for title, note, tensors, extra in (
        ("Logits", "by the way the model is run", measured.ways, ()),
        ("Modules", "each fed the reference's input", measured.modules, ("mlx-lm so far", "transformers so far")),
    ):
        if rows := [_library_row(tensor) for tensor in tensors]:
            summary = _summary(rows, max(tensor.ratios[0] for tensor in tensors))
            tables.append(TensorTable(title, note, (*columns, *extra), tuple(rows), summary))
    propagated = {module.name: module.propagated for module in measured.modules if module.propagated}
    return LibrarySection(library, tables, error_growth(propagated))


def _library_row(tensor: LibraryTensorVerdict) -> TensorRow:
    rmse, largest = tensor.ratios
    errors = [_error(error) for error in (tensor.mlx, tensor.torch, tensor.floor)]
    cells = (*errors, _tinted(rmse, tensor.passed), Cell(_ratio(largest)), *map(_error, tensor.propagated or ()))
    return TensorRow(tensor.name, cells, tensor.passed, () if tensor.passed else (tensor.figures,))


def _summary(rows: Sequence[TensorRow], worst: float) -> str:
    failed = sum(not row.passed for row in rows)
    tensors = f"{len(rows)} tensor{'' if len(rows) == 1 else 's'}"
    return f"{tensors}, {f'{failed} outside the tolerance, ' if failed else ''}largest ratio {_ratio(worst)}"


def _tinted(ratio: float, passed: bool, text: str = "") -> Cell:
    tint = f"heat-{sum(ratio > limit for limit in HEAT)}" if passed else "failed"
    return Cell(text or _ratio(ratio), tint)


def _error(error: TensorError) -> Cell:
    return Cell(_number(error.rmse))


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "∞"


def _ratio(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"
