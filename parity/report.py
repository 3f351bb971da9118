"""What a comparison says in the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from mlx_moe.training.console import Console
from mlx_moe.transfer.certificate import Certificate
from parity.compare import LIMITS, Comparison


def show(comparisons: Iterable[Comparison], as_json: bool) -> int:
    """Print every comparison and the verdict. Returns 0 if all passed, else 1."""
    results = list(comparisons)
    passed = all(result.passed for result in results)
    if as_json:
        print(json.dumps({"passed": passed, "comparisons": [_to_json(result) for result in results]}, indent=2))
        return 0 if passed else 1
    console = Console()
    console.title("MLX against PyTorch, fp32, largest absolute differences")
    console.table(
        ["model", "logits", "loss", "boundary mlx", "boundary torch", ""],
        [
            [
                result.subject,
                _logits(result.backends),
                f"{abs(result.backends.loss_jump):.1e}",
                _logits(result.boundary_mlx),
                _logits(result.boundary_torch),
                "same" if result.passed else "DIFFERS",
            ]
            for result in results
        ],
    )
    failed = sum(not result.passed for result in results)
    verdict = f"{failed} differ" if failed else "all the same"
    limits = f"logits {LIMITS.max_logit_difference:g}, loss {LIMITS.max_loss_jump:g}"
    console.line(f"{len(results)} models, {verdict} (limits: {limits})")
    if any(certificate.routing_flips for result in results for certificate in result.certificates.values()):
        console.line("*: experts that tie up to rounding were chosen differently; compared with the same experts")
    return 0 if passed else 1


def _logits(certificate: Certificate | None) -> str:
    if certificate is None:
        return ""
    return f"{certificate.max_logit_difference:.1e}" + ("*" if certificate.routing_flips else "")


def _to_json(result: Comparison) -> dict[str, Any]:
    found = {name: certificate.to_json() for name, certificate in result.certificates.items()}
    return {"subject": result.subject, "architecture": result.architecture, "passed": result.passed, **found}
