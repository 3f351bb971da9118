"""What the commands of the table work on: small, built once, and copied for every case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from commands import DENSE, ON_CPU, SIZE, TRAIN
from running import run_here

SWEEP = """\
name: tiny
preset: llama
overrides: {phases.dense.steps: 2, %s}
axes:
  seed: [0]
"""


def build(folder: Path, cache: Path) -> None:
    """Fill a folder with a finished run of two phases, a Hugging Face model, a finished sweep, results to fit to."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    (folder / "tmp" / "of-others.txt").write_text("somebody's\n")
    _mlxmoe(folder, cache, "train", "--phases", "2", *TRAIN, "--out", "run")
    _mlxmoe(folder, cache, "export", DENSE, "model", "--no-verify")
    overrides = ", ".join(override.replace("=", ": ") for override in SIZE)
    (folder / "sweep.yaml").write_text(SWEEP % overrides)
    _mlxmoe(folder, cache, "sweep", "sweep.yaml", *ON_CPU, "--out", "sweep")
    (folder / "scaling").mkdir()
    rows = [
        {"run": f"r{n}", "status": "finished", "choices": {"n": n}, "seed": 0, "tokens": 10_000}
        | {f"parameters_{kind}": n for kind in ("non_embedding", "active", "total")}
        | {"validation_loss": 1.5 + 40 * n**-0.4}
        for n in (1_000, 3_000, 10_000, 30_000, 100_000)
    ]
    (folder / "scaling" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def copy(materials: Path, folder: Path) -> Path:
    """A copy to work in, at a place that may have held an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(materials, folder, symlinks=True)
    return folder


def _mlxmoe(folder: Path, cache: Path, *argv: str) -> None:
    outcome = run_here(argv, folder, {"MLXMOE_CACHE": str(cache)})
    if outcome.code:
        raise RuntimeError(f"mlxmoe {' '.join(argv)}: {outcome.err}{outcome.crash or ''}")
