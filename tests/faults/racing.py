"""Runs commands at the same moment, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from running import Outcome, run_here

# A server that has imported everything forks the processes, so that they start in no time. macOS's frameworks cannot
# be forked.
CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")
PRELOADED = [
    *("cli", "mlx_moe.model.trainer", "torch_ref.trainer", "mlx_moe.hub.models", "mlx_moe.hub.export", "matplotlib"),
    *("mlx_moe.analysis.plots", "mlx_moe.analysis.report", "mlx_moe.analysis.experts", "mlx_moe.analysis.evaluation"),
    *("mlx_moe.training.run", "mlx_moe.analysis.sweep_runs", "mlx_moe.analysis.fitting", "parity.run"),
    *("mlx_moe.data.describe", "mlx_moe.training.run_plan", "mlx_moe.inference.decoding", "pytest", "torch._dynamo"),
]
if sys.platform != "darwin":
    CONTEXT.set_forkserver_preload(PRELOADED)
LONGEST = 120  # seconds


def run_at_once(calls: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str]) -> list[Outcome]:
    """Run `mlxmoe ARGV` for each of the calls in one folder, all begun together."""
    barrier = CONTEXT.Barrier(len(calls))
    ends = []
    for argv in calls:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_call, args=(theirs, barrier, argv, folder, dict(environment)), daemon=False)
        process.start()
        theirs.close()
        ends.append((process, ours))
    outcomes = []
    for process, pipe in ends:
        ended = pipe.poll(LONGEST)
        outcomes.append(pipe.recv() if ended else Outcome(-1, "", "", f"no end after {LONGEST} s"))
        if not ended:
            process.kill()
        process.join()
    return outcomes


def _call(pipe: Connection, barrier: Any, argv: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    barrier.wait(LONGEST)
    pipe.send(run_here(argv, folder, environment))
