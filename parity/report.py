"""What a comparison says in the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from mlx_moe.training.console import Console
from parity.compare import LIMIT_LOGITS, LIMIT_LOSS, Comparison


def show(comparisons: Iterable[Comparison], as_json: bool) -> int:
    """Print every comparison and the verdict. Returns 0 if all passed, else 1."""
    results = list(comparisons)
    passed = all(result.passed for result in results)
    if as_json:
        rows = [asdict(result) | {"passed": result.passed} for result in results]
        limits = {"logits": LIMIT_LOGITS, "loss": LIMIT_LOSS}
        print(json.dumps({"passed": passed, "limits": limits, "comparisons": rows}, indent=2))
        return 0 if passed else 1
    console = Console()
    console.title("MLX against PyTorch, fp32, largest absolute differences")
    console.table(
        ["model", "logits", "loss", "boundary mlx", "boundary torch", ""],
        [
            [
                result.subject,
                f"{result.logits:.1e}",
                f"{result.loss:.1e}",
                _figure(result.boundary_mlx),
                _figure(result.boundary_torch),
                "same" if result.passed else "DIFFERS",
            ]
            for result in results
        ],
    )
    failed = sum(not result.passed for result in results)
    verdict = f"{failed} differ" if failed else "all the same"
    console.line(f"{len(results)} models, {verdict} (limits: logits {LIMIT_LOGITS:g}, loss {LIMIT_LOSS:g})")
    return 0 if passed else 1


def _figure(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"
