"""Print a parity report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_moe.training.console import Console
from parity.compare import LIMITS
from parity.report import (
    LibraryReport,
    ModelComparison,
    ModelVerdict,
    ParityReport,
    Scope,
    SelfTest,
    TensorVerdict,
    agreement,
    tensors_by_scope,
)
from parity.tolerances import CHECKPOINT_SLACK, TO_FLOAT32, TO_OTHER

VERDICTS = {True: "same", False: "DIFFERS", None: "not judged"}
CONTEXT = 3  # modules shown before and after the first that fails
# Scopes that get one line each; "module" and "model" are summarized in more detail.
SCOPE_LABELS: dict[Scope, str] = {"decode": "decoding", "train": "training step", "half": "half precision"}


def show(report: ParityReport) -> None:
    """Print everything that was compared.

    Raises ValueError where a tensor has a scope that `report.tensors_by_scope` does not know.
    """
    console = Console()
    if report.library:
        _show_library(console, report.library)
    if report.comparisons:
        _show_comparisons(console, report.comparisons)
    if report.self_test:
        _show_self_test(console, report.self_test)


def _show_comparisons(console: Console, comparisons: Sequence[ModelComparison]) -> None:
    console.title("MLX and PyTorch against a float64 reference: RMSE of the logits")
    console.table(
        ["model", "mlx", "torch", "ratio", "float32", "floor", "boundary", ""],
        [
            [
                comparison.subject,
                *(_logit_errors(comparison.verdict) if comparison.verdict else [""] * 5),
                _boundary(comparison),
                VERDICTS[comparison.passed],
            ]
            for comparison in comparisons
        ],
    )
    for comparison in comparisons:
        _show_faults(console, comparison)
    verdicts = [comparison.verdict for comparison in comparisons if comparison.verdict]
    if verdicts:
        console.summary(_totals(verdicts, comparisons))
    limits = f"limits at boundaries: logits {LIMITS.max_logit_difference:g}, loss {LIMITS.max_loss_jump:g}"
    console.line(f"{agreement(comparisons)} ({limits})")
    if any(certificate.routing_flips for each in comparisons for certificate in each.certificates.values()):
        console.line("*: rounding decided a tie of experts; judged with the same experts on both sides")


def _show_faults(console: Console, comparison: ModelComparison) -> None:
    subject, verdict = comparison.subject, comparison.verdict
    if comparison.without_reference:
        console.line(f"{subject}: {comparison.without_reference}")
    if verdict and not verdict.passed:
        console.line(f"{subject}: {verdict.first_fault()}")
        _show_modules(console, verdict)
    for name, certificate in comparison.certificates.items():
        if not certificate.passed:
            console.line(f"{subject}: {name}, logits {certificate.max_logit_difference:.1e} apart")
    for claim in comparison.claims:
        if not claim.passed:
            console.line(f"{subject}: {claim}")


def _show_modules(console: Console, verdict: ModelVerdict) -> None:
    """Print the modules around the first that fails: their own errors, and with those of all earlier modules."""
    modules = tensors_by_scope(verdict.tensors)["module"]
    first = next((i for i, module in enumerate(modules) if not module.passed), None)
    if first is None:
        return
    rows = []
    for module in modules[max(0, first - CONTEXT) : first + CONTEXT + 1]:
        own = [f"{error.rmse:.1e}" for error in (module.mlx, module.torch, module.float32)]
        so_far = [f"{error.rmse:.1e}" for error in verdict.propagated.get(module.name, ())] or ["", ""]
        rows.append([module.name, *own, *so_far, VERDICTS[module.passed]])
    console.table(["module", "mlx", "torch", "float32", "mlx so far", "torch so far", ""], rows)


def _logit_errors(verdict: ModelVerdict) -> list[str]:
    logits = verdict.logits
    mlx, torch, float32, floor = (
        f"{error.rmse:.1e}" for error in (logits.mlx, logits.torch, logits.float32, logits.floor)
    )
    return [mlx, torch, f"{verdict.logits_ratio:.2f}", float32, floor]


def _boundary(comparison: ModelComparison) -> str:
    difference = comparison.boundary_difference
    return "" if difference is None else f"{difference:.1e}{'*' if comparison.has_boundary_ties else ''}"


def _totals(verdicts: Sequence[ModelVerdict], comparisons: Sequence[ModelComparison]) -> list[tuple[str, str]]:
    """Return names and values over all models."""
    scopes = tensors_by_scope(tensor for verdict in verdicts for tensor in verdict.tensors)
    modules = [*scopes["module"], *scopes["model"]]
    to_other, to_float32 = _worst(modules), max(modules, key=lambda tensor: tensor.ratio_to_float32)
    totals = [
        ("modules", f"{len(modules)} tensors: modules fed the reference's input; router logits and logits"),
        ("against the other", f"RMSE at most {to_other.ratio_to_other:.2f} times ({to_other.name}; "
         f"limit {_limit(TO_OTHER.rmse)})"),
        ("against float32", f"RMSE at most {to_float32.ratio_to_float32:.2f} times plain float32's "
         f"({to_float32.name}; limit {_limit(TO_FLOAT32.rmse)})"),
    ]  # fmt: skip
    for scope, label in SCOPE_LABELS.items():
        if found := scopes[scope]:
            worst = _worst(found)
            totals.append(
                (
                    label,
                    f"{len(found)} tensors, RMSE at most {worst.ratio_to_other:.2f} times the other's ({worst.name})",
                )
            )
    margins = [margin for verdict in verdicts for margin in verdict.margins]
    if margins:
        closest = min(margins, key=lambda margin: margin.smallest / max(margin.error, 1e-30))
        flips = sum(verdict.flips for verdict in verdicts)
        totals.append((
            "routing",
            f"margins down to {closest.smallest:.1e}, router errors up to {closest.error:.1e} there; {flips} ties "
            "decided by rounding, then judged with the reference's experts",
        ))  # fmt: skip
    if claims := [claim for comparison in comparisons for claim in comparison.claims]:
        holding = sum(claim.passed for claim in claims)
        totals.append(
            ("transfers", f"{holding} of {len(claims)} claims hold: forced routes, growth by layer, plans, gradients")
        )
    impacts = [verdict.impact for verdict in verdicts]
    totals.append((
        "MLX against PyTorch",
        f"at worst KL {max(impact.kl for impact in impacts):.0e} nats, same likeliest token "
        f"{100 * min(impact.top1_agreement for impact in impacts):.2f} %, "
        f"loss {max(abs(impact.loss_difference) for impact in impacts):.0e} apart",
    ))  # fmt: skip
    return totals


def _worst(tensors: Sequence[TensorVerdict]) -> TensorVerdict:
    return max(tensors, key=lambda tensor: tensor.ratio_to_other)


def _limit(limit: float) -> str:
    return f"{limit:g}, {CHECKPOINT_SLACK * limit:g} in modules of checkpoints"


def _show_library(console: Console, library: LibraryReport) -> None:
    measured = library.measured
    console.title(f"{library.folder}: {library.model_type}, {library.n_parameters / 1e6:.1f} M parameters")
    if measured:
        console.table(
            ["mlx-lm's logits", "mlx-lm", "transformers", "floor", "ratio", "largest", ""],
            [
                [
                    way.name,
                    *(f"{error.rmse:.1e}" for error in (way.mlx, way.torch, way.floor)),
                    *(f"{ratio:.3g}" for ratio in way.ratios),
                    VERDICTS[way.passed],
                ]
                for way in measured.ways
            ],
        )
    console.summary(list(_library_facts(library)))
    for line in library.remarks():
        console.line(line)
    console.line(f"mlx-lm against transformers: {VERDICTS[library.passed]}")


def _library_facts(library: LibraryReport) -> Iterator[tuple[str, str]]:
    measured = library.measured
    if measured is None:
        return
    limits = f"RMSE at most {TO_OTHER.rmse:g} times transformers', the largest error {TO_OTHER.largest:g} times"
    yield "judged", f"{measured.judged} positions; {limits}"
    if library.margins:
        yield (
            "routing",
            f"margins down to {min(library.margins):.1e}; {measured.flips} ties decided by rounding, then judged with "
            "the reference's experts",
        )
    yield "difference", f"KL {measured.kl:.0e} nats, same likeliest token {100 * measured.top1_agreement:.2f} %"
    yield "modules", f"{len(measured.modules)} by the same name, {sum(not m.passed for m in measured.modules)} differ"


def _show_self_test(console: Console, self_test: SelfTest) -> None:
    console.title("Known faults, put into PyTorch's side one at a time")
    console.table(
        ["fault", "model", "", "found first in"],
        [
            [outcome.name, outcome.architecture, "caught" if outcome.caught else "MISSED", outcome.where or ""]
            for outcome in self_test.outcomes
        ],
    )
    console.summary(
        [
            (f"smallest {threshold.name}", f"{threshold.smallest:g} of itself" if threshold.smallest else "none caught")
            for threshold in self_test.thresholds
        ]
    )
    n_caught, n_faults = self_test.n_caught, len(self_test.outcomes)
    console.line(f"mutation score {self_test.score:.0f} %: {n_caught} of {n_faults} caught")
