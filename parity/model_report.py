"""What a comparison of mlx-lm with transformers says in the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mlx_moe.training.console import Console
from parity.any_model import Report
from parity.library_bench import Judged
from parity.yardstick import RATIO_LARGEST, RATIO_RMSE

VERDICTS = {True: "same", False: "DIFFERS", None: "not judged"}


def show_model(report: Report) -> None:
    console, measured = Console(), report.measured
    console.title(f"{report.folder}: {report.model_type}, {report.n_parameters / 1e6:.1f} M parameters")
    if measured:
        console.table(
            ["mlx-lm's logits", "mlx-lm", "transformers", "floor", "ratio", "largest", ""],
            [
                [
                    way.name,
                    *(f"{error.rmse:.1e}" for error in (way.mlx, way.torch, way.floor)),
                    *(f"{ratio:.3g}" for ratio in way.ratios),
                    "same" if way.passed else "DIFFERS",
                ]
                for way in measured.ways
            ],
        )
    console.facts(list(_facts(report)))
    for line in _lines(report):
        console.line(line)
    console.line(f"mlx-lm against transformers: {VERDICTS[report.passed]}")


def model_json(report: Report) -> dict[str, Any]:
    """All figures; errors are RMSEs and largest ones against float64."""
    measured = report.measured
    found: dict[str, Any] = {
        "folder": report.folder,
        "model_type": report.model_type,
        "parameters": report.n_parameters,
        "passed": report.passed,
        "problem": report.problem,
        "causes": report.causes,
        "repair": report.repair,
        "keys_that_one_library_uses": [asdict(finding) for finding in report.findings],
        "tensors_dropped_or_made_up": report.parameters,
        "smallest_routing_margins": report.margins,
        "config_sha256": report.config_sha256,
        "weights_sha256": report.weights_sha256,
    }
    if measured:
        first = measured.first_module
        found |= {
            "kl": measured.kl,
            "top1_agreement": measured.top1_agreement,
            "wrong_tokens": measured.wrong_tokens,
            "remarks": measured.remarks,
            "positions_judged": measured.judged,
            "flips": measured.flips,
            "misrouted": measured.misrouted,
            "first_module": first.name if first else None,
            "ways": [_judged(way) for way in measured.ways],
            "modules": [_judged(module) for module in measured.modules],
        }
    return found


def _judged(judged: Judged) -> dict[str, Any]:
    return asdict(judged) | {"ratios": judged.ratios, "passed": judged.passed}


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    measured = report.measured
    if measured is None:
        return
    yield (
        "judged",
        f"{measured.judged} positions; RMSE at most {RATIO_RMSE:g} times transformers', {RATIO_LARGEST:g} anywhere",
    )
    if report.margins:
        yield (
            "routing",
            f"margins down to {min(report.margins):.1e}; {measured.flips} choices of other experts at ties, then "
            "judged with the truth's",
        )
    yield "impact", f"KL {measured.kl:.0e} nats, same likeliest token {100 * measured.top1_agreement:.2f} %"
    yield "modules", f"{len(measured.modules)} by the same name, {sum(not m.passed for m in measured.modules)} differ"


def _lines(report: Report) -> Iterator[str]:
    measured = report.measured
    if report.problem:
        yield report.problem
    if measured:
        yield from measured.remarks
        if measured.misrouted:
            yield f"routing: {measured.misrouted} choices of experts are not the truth's, beyond rounding"
        if measured.wrong_tokens:
            yield f"greedy generation: {measured.wrong_tokens} tokens are not the truth's, beyond rounding"
        if measured.first_module and not measured.passed:
            yield f"first in {measured.first_module}"
    yield from (f"tensor {remark}" for remark in report.parameters)
    if report.causes:
        yield from (f"cause: {cause}" for cause in report.causes)
    elif report.passed is False:
        yield "cause: no single key of config.json explains it"
    if report.repair:
        yield report.repair
    ignored = [finding for finding in report.findings if not any(c.startswith(finding.said) for c in report.causes)]
    for library in ("mlx-lm", "transformers"):
        keys = ", ".join(finding.said for finding in ignored if finding.ignored_by == library)
        if keys:
            harmless = ", without effect here" if report.passed or report.causes else ""
            yield f"{library} alone ignores{harmless}: {keys}"
