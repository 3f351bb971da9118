"""What a comparison and a self-test say in the terminal, and as JSON."""

from __future__ import annotations

import json
import math
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_moe.training.console import Console
from mlx_moe.training.log import library_versions
from parity import self_test
from parity.compare import LIMITS, Comparison, compare_architectures, compare_checkpoints
from parity.yardstick import CHECKPOINT_SLACK, FLOAT32_LARGEST, FLOAT32_RMSE, RATIO_LARGEST, RATIO_RMSE, Verdict

Json = dict[str, Any]


def report(checkpoint: Path | None, presets: Sequence[str], seed: int, with_faults: bool, as_json: bool) -> int:
    """Compare, or with faults put in see that they are found; print. Returns 0 if all is well, else 1.

    Raises InputError where nothing can be judged.
    """
    words = [str(checkpoint)] if checkpoint else [word for name in presets for word in ("--preset", name)]
    words += ["--seed", str(seed), *(["--self-test"] if with_faults else [])]
    about = {
        "command": shlex.join(["mlxmoe", "parity", *words]),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
    }
    if with_faults:
        return show_self_test(*self_test.run(seed), about, as_json)
    return show(
        compare_checkpoints(checkpoint, seed) if checkpoint else compare_architectures(presets, seed), about, as_json
    )


def show(comparisons: Iterable[Comparison], about: Json, as_json: bool) -> int:
    results = list(comparisons)
    passed = all(result.passed for result in results)
    if as_json:
        limits = {"ratio": [RATIO_RMSE, RATIO_LARGEST], "float32": [FLOAT32_RMSE, FLOAT32_LARGEST]}
        found = {"passed": passed, "limits_rmse_and_largest": limits, "comparisons": [_to_json(r) for r in results]}
        _print_json(about | found)
        return 0 if passed else 1
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
        if result.without_truth:
            console.line(f"{result.subject}: {result.without_truth}")
        if result.verdict and not result.verdict.passed:
            console.line(f"{result.subject}: {result.verdict.first_fault()}")
        for name, certificate in result.certificates.items():
            if not certificate.passed:
                console.line(f"{result.subject}: {name}, logits {certificate.max_logit_difference:.1e} apart")
    _show_totals(console, [result.verdict for result in results if result.verdict])
    failed = sum(not result.passed for result in results)
    limits_in_words = f"boundaries: logits {LIMITS.max_logit_difference:g}, loss {LIMITS.max_loss_jump:g}"
    console.line(f"{len(results)} models, {f'{failed} differ' if failed else 'all the same'} ({limits_in_words})")
    if any(certificate.routing_flips for result in results for certificate in result.certificates.values()):
        console.line("*: experts that tie up to rounding were chosen differently; compared with the same experts")
    return 0 if passed else 1


def show_self_test(
    outcomes: Sequence[self_test.Outcome], thresholds: Sequence[self_test.Threshold], about: Json, as_json: bool
) -> int:
    caught = sum(outcome.caught for outcome in outcomes)
    if as_json:
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
        score = {"passed": caught == len(outcomes), "caught": caught, "faults": faults, "smallest_caught": smallest}
        _print_json(about | score)
        return 0 if caught == len(outcomes) else 1
    console = Console()
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
    return 0 if caught == len(outcomes) else 1


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


def _show_totals(console: Console, verdicts: Sequence[Verdict]) -> None:
    if not verdicts:
        return
    tensors = [tensor for verdict in verdicts for tensor in verdict.tensors]
    ratio, name = max(
        (max(t.mlx.times(t.torch, t.float32)[0], t.torch.times(t.mlx, t.float32)[0]), t.name) for t in tensors
    )
    over, over_name = max(
        (max(error.times(t.float32, t.float32)[0] for error in (t.mlx, t.torch)), t.name) for t in tensors
    )
    console.facts(
        [
            ("judged", f"{len(tensors)} tensors: each module fed the truth's input, routers and logits of the whole"),
            ("one backend's error", f"at most {ratio:.2f} times the other's ({name}; limit {_limit(RATIO_RMSE)})"),
            (
                "either one's",
                f"at most {over:.2f} times that of plain float32 ({over_name}; limit {_limit(FLOAT32_RMSE)})",
            ),
            (
                "MLX against PyTorch",
                f"KL {max(v.impact.kl for v in verdicts):.0e} nats, same likeliest token "
                f"{100 * min(v.impact.top1_agreement for v in verdicts):.2f} %, "
                f"loss {max(abs(v.impact.loss_difference) for v in verdicts):.0e} apart, at worst",
            ),
            ("experts that tie", f"{sum(v.flips for v in verdicts)} chosen differently, then judged with the truth's"),
        ]
    )


def _to_json(result: Comparison) -> Json:
    found: Json = {"subject": result.subject, "architecture": result.architecture, "passed": result.passed}
    if result.verdict:
        verdict = result.verdict
        found |= {
            "first_fault": verdict.first_fault(),
            "flips": verdict.flips,
            "routing_faults": verdict.routing_faults,
            "impact": asdict(verdict.impact),
            "tensors": [asdict(tensor) | {"passed": tensor.passed} for tensor in verdict.tensors],
            "propagated": {
                name: {"mlx": asdict(mlx), "torch": asdict(torch)} for name, (mlx, torch) in verdict.propagated.items()
            },
        }
    else:
        found["without_truth"] = result.without_truth
    return found | {name: certificate.to_json() for name, certificate in result.certificates.items()}


def _print_json(value: Json) -> None:
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    """Null stands for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
