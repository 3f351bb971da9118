"""What a comparison of the backends and a self-test say in the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlx_moe.training.console import Console
from parity.compare import LIMITS, Comparison
from parity.self_test import Outcome, Threshold
from parity.yardstick import (
    CHECKPOINT_SLACK,
    FLOAT32_LARGEST,
    FLOAT32_RMSE,
    HALF_LARGEST,
    HALF_RMSE,
    RATIO_LARGEST,
    RATIO_RMSE,
    Judged,
    Verdict,
)

Json = dict[str, Any]
AROUND = 3  # modules shown before and after the first that fails


def show_comparisons(results: Sequence[Comparison]) -> None:
    console = Console()
    console.title("MLX and PyTorch against the truth (float64 NumPy): errors of the logits, RMSE")
    console.table(
        ["model", "mlx", "torch", "ratio", "float32", "floor", "boundary", ""],
        [
            [
                result.subject,
                *(_errors(result.verdict) if result.verdict else ["", "", "", "", ""]),
                _boundary(result),
                "same" if result.passed else "DIFFERS",
            ]
            for result in results
        ],
    )
    for result in results:
        _show_faults(console, result)
    _show_totals(console, results)
    failed = sum(not result.passed for result in results)
    limits_in_words = f"boundaries: logits {LIMITS.max_logit_difference:g}, loss {LIMITS.max_loss_jump:g}"
    console.line(f"{len(results)} models, {f'{failed} differ' if failed else 'all the same'} ({limits_in_words})")
    if any(certificate.routing_flips for result in results for certificate in result.certificates.values()):
        console.line("*: experts that tie up to rounding were chosen differently; compared with the same experts")


def comparisons_json(results: Sequence[Comparison]) -> Json:
    limits = {
        "ratio": [RATIO_RMSE, RATIO_LARGEST],
        "float32": [FLOAT32_RMSE, FLOAT32_LARGEST],
        "half": [HALF_RMSE, HALF_LARGEST],
    }
    return {"limits_rmse_and_largest": limits, "comparisons": [_to_json(result) for result in results]}


def show_self_test(outcomes: Sequence[Outcome], thresholds: Sequence[Threshold]) -> None:
    console, caught = Console(), sum(outcome.caught for outcome in outcomes)
    console.title("Known faults, put into PyTorch's side one at a time")
    console.table(
        ["fault", "model", "", "found first in"],
        [
            [o.mutation.name, o.mutation.architecture, "caught" if o.caught else "MISSED", o.where or ""]
            for o in outcomes
        ],
    )
    console.facts(
        [
            (f"smallest {threshold.name}", f"{threshold.smallest:g} of itself" if threshold.smallest else "none caught")
            for threshold in thresholds
        ]
    )
    console.line(f"mutation score {100 * caught / len(outcomes):.0f} %: {caught} of {len(outcomes)} caught")


def self_test_json(outcomes: Sequence[Outcome], thresholds: Sequence[Threshold]) -> Json:
    faults = [
        {
            "name": o.mutation.name,
            "model": o.mutation.architecture,
            "caught": o.caught,
            "where": o.where,
            "said": o.said,
        }
        for o in outcomes
    ]
    smallest = {threshold.name: threshold.smallest for threshold in thresholds}
    return {"caught": sum(o.caught for o in outcomes), "faults": faults, "smallest_caught": smallest}


def _show_faults(console: Console, result: Comparison) -> None:
    if result.without_truth:
        console.line(f"{result.subject}: {result.without_truth}")
    if result.verdict and not result.verdict.passed:
        console.line(f"{result.subject}: {result.verdict.first_fault()}")
        _show_modules(console, result.verdict)
    for name, certificate in result.certificates.items():
        if not certificate.passed:
            console.line(f"{result.subject}: {name}, logits {certificate.max_logit_difference:.1e} apart")
    for claim in result.claims:
        if not claim.passed:
            console.line(f"{result.subject}: {claim}")


def _show_modules(console: Console, verdict: Verdict) -> None:
    """The modules around the first that fails: their own error, and that of all up to them."""
    modules = [tensor for tensor in verdict.tensors if tensor.scope == "own"]
    first = next((i for i, module in enumerate(modules) if not module.passed), None)
    if first is None:
        return
    rows = []
    for module in modules[max(0, first - AROUND) : first + AROUND + 1]:
        own = [f"{error.rmse:.1e}" for error in (module.mlx, module.torch, module.float32)]
        so_far = [f"{error.rmse:.1e}" for error in verdict.propagated.get(module.name, ())] or ["", ""]
        rows.append([module.name, *own, *so_far, "same" if module.passed else "DIFFERS"])
    console.table(["module", "mlx", "torch", "float32", "mlx, all so far", "torch, all so far", ""], rows)


def _errors(verdict: Verdict) -> list[str]:
    logits = verdict.logits
    ratio, _ = logits.mlx.times(logits.torch, logits.floor)
    rmse = [f"{error.rmse:.1e}" for error in (logits.mlx, logits.torch, logits.float32, logits.floor)]
    return [*rmse[:2], f"{ratio:.2f}", *rmse[2:]]


def _boundary(result: Comparison) -> str:
    """The larger of the two backends' largest differences of the logits."""
    found = [certificate for certificate in (result.boundary_mlx, result.boundary_torch) if certificate]
    if not found:
        return ""
    starred = "*" if any(certificate.routing_flips for certificate in found) else ""
    return f"{max(certificate.max_logit_difference for certificate in found):.1e}{starred}"


def _limit(limit: float) -> str:
    return f"{limit:g}, {CHECKPOINT_SLACK * limit:g} in modules of checkpoints"


def _show_totals(console: Console, results: Sequence[Comparison]) -> None:
    verdicts = [result.verdict for result in results if result.verdict]
    if not verdicts:
        return
    tensors = [tensor for verdict in verdicts for tensor in verdict.tensors]
    modules = [tensor for tensor in tensors if tensor.scope in ("own", "whole")]
    ratio, name = max((_ratio(tensor), tensor.name) for tensor in modules)
    over, over_name = max(
        (max(error.times(t.float32, t.float32)[0] for error in (t.mlx, t.torch)), t.name) for t in modules
    )
    facts = [
        ("judged", f"{len(modules)} tensors: each module fed the truth's input, routers and logits of the whole"),
        ("one backend's error", f"at most {ratio:.2f} times the other's ({name}; limit {_limit(RATIO_RMSE)})"),
        ("either one's", f"at most {over:.2f} times that of plain float32 ({over_name}; limit {_limit(FLOAT32_RMSE)})"),
    ]
    for scope, what in (
        ("way", "with a cache"),
        ("step", "gradients and steps"),
        ("half", "in bf16, fp16"),
    ):
        found = [tensor for tensor in tensors if tensor.scope == scope]
        if found:
            worst, worst_name = max((_ratio(tensor), tensor.name) for tensor in found)
            facts.append((what, f"{len(found)} tensors, errors at most {worst:.2f} times the other's ({worst_name})"))
    margins = [margin for verdict in verdicts for margin in verdict.margins]
    if margins:
        closest = min(margins, key=lambda margin: margin.smallest / max(margin.error, 1e-30))
        flips = sum(verdict.flips for verdict in verdicts)
        facts.append(
            (
                "routing",
                f"margins down to {closest.smallest:.1e}, where routers' errors reach {closest.error:.1e}; {flips} "
                "choices of other experts, then judged with the truth's",
            )
        )
    claims = [claim for result in results for claim in result.claims]
    if claims:
        kept = sum(claim.passed for claim in claims)
        facts.append(
            ("transfers", f"{kept} of {len(claims)} claims hold: forced routes, growth by layer, plans, gradients")
        )
    facts.append(
        (
            "MLX against PyTorch",
            f"KL {max(v.impact.kl for v in verdicts):.0e} nats, same likeliest token "
            f"{100 * min(v.impact.top1_agreement for v in verdicts):.2f} %, "
            f"loss {max(abs(v.impact.loss_difference) for v in verdicts):.0e} apart, at worst",
        )
    )
    console.facts(facts)


def _ratio(tensor: Judged) -> float:
    return max(tensor.mlx.times(tensor.torch, tensor.float32)[0], tensor.torch.times(tensor.mlx, tensor.float32)[0])


def _to_json(result: Comparison) -> Json:
    found: Json = {"subject": result.subject, "architecture": result.architecture, "passed": result.passed}
    if result.verdict:
        verdict = result.verdict
        found |= {
            "first_fault": verdict.first_fault(),
            "flips": verdict.flips,
            "routing_faults": verdict.routing_faults,
            "wrong_words": verdict.wrong_words,
            "routing_margins": [asdict(margin) for margin in verdict.margins],
            "impact": asdict(verdict.impact),
            "tensors": [asdict(tensor) | {"passed": tensor.passed} for tensor in verdict.tensors],
            "propagated": {
                name: {"mlx": asdict(mlx), "torch": asdict(torch)} for name, (mlx, torch) in verdict.propagated.items()
            },
        }
    else:
        found["without_truth"] = result.without_truth
    found["weights_sha256"] = result.weights_sha256
    found["claims"] = [asdict(claim) | {"passed": claim.passed} for claim in result.claims]
    return found | {name: certificate.to_json() for name, certificate in result.certificates.items()}
