"""Runs a sweep: every run in a process of its own, one after the other or several at once.

The sweep's folder holds `sweep.json` (what is to run), a folder and a log per run, and the results so far:
`results.jsonl`, `results.csv` and `summary.json`. A finished run is not run again, an interrupted one goes on, and one
that failed stays as it is and is named.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_moe.analysis import one_run
from mlx_moe.analysis.one_run import SWEEP
from mlx_moe.analysis.results import FAILURE, gather, show, write
from mlx_moe.analysis.sweeps import PlannedRun
from mlx_moe.errors import InputError
from mlx_moe.storage.atomic import make_folder, replacing, set_aside
from mlx_moe.storage.reading import read_mapping
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.stopping import TrainingStopped, interruptions

LOGS = "logs"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class SweepOptions:
    """What belongs to this call and not to the sweep. `retry`: run what failed once more, from its beginning."""

    backend: str = "auto"
    device: str = "auto"
    jobs: int = 1
    retry: bool = False


@dataclass(frozen=True)
class _Started:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    since: float


def run_sweep(planned: Sequence[PlannedRun], out: Path, options: SweepOptions) -> list[dict[str, Any]]:
    """Train what is not finished, and write the results after every run; returns their rows.

    Raises TrainingStopped on a signal, once the runs at work have saved; InputError where the folder holds other runs.
    """
    choose_backend(options.backend)  # says so here, and not in every log, where there is none
    _begin(planned, out)
    console, order = Console(), {run.name: number for number, run in enumerate(planned, 1)}
    if options.retry:
        _forget_failures(planned, out)
    waiting = []
    for run, row in zip(planned, gather(planned, out), strict=True):
        if row["status"] in ("finished", "failed"):
            console.line(f"[{order[run.name]}/{len(planned)}] {run.name}: {_verdict(row)}")
        else:
            waiting.append(run)
    running: list[_Started] = []
    try:
        with interruptions() as interruption:
            while running or (waiting and interruption.received is None):
                while waiting and len(running) < options.jobs and interruption.received is None:
                    running.append(_start(waiting.pop(0), out, options))
                for started in [started for started in running if started.process.poll() is not None]:
                    running.remove(started)
                    _finish(started, out, interruption.received is not None)
                    rows, number = gather(planned, out), order[started.run.name]
                    write(rows, out)
                    verdict = f"{_verdict(rows[number - 1])} in {time.monotonic() - started.since:.0f} s"
                    console.line(f"[{number}/{len(planned)}] {started.run.name}: {verdict}")
                if interruption.received is not None and running:
                    _interrupt(running, console)
                time.sleep(POLL_SECONDS)
    finally:
        for started in running:  # a second signal: nothing is saved, nothing stays behind
            started.process.kill()
    rows = gather(planned, out)
    write(rows, out)
    if interruption.received is not None:
        name = signal.Signals(interruption.received).name
        raise TrainingStopped(f"{name}: stopped; the same command goes on with {out}", 128 + interruption.received)
    show(rows, out, console)
    return rows


def _begin(planned: Sequence[PlannedRun], out: Path) -> None:
    """Write down what is to run. Raises InputError where runs of the same name were something else."""
    file = out / SWEEP
    before = read_mapping(file) if file.is_file() else {}
    runs = {run.name: run.to_json() for run in planned}
    changed = [name for name, run in runs.items() if name in before and before[name] != run]
    if changed:
        raise InputError(
            f"{out} holds another sweep: {changed[0]} ({len(changed)} such) has another config; name another --out"
        )
    if not file.is_file() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no sweep; name another --out")
    make_folder(out / LOGS)
    with replacing(file) as partial:
        partial.write_text(json.dumps(before | runs, indent=1) + "\n", encoding="utf-8")


def _forget_failures(planned: Sequence[PlannedRun], out: Path) -> None:
    for run in planned:
        if (out / run.name / FAILURE).is_file():
            set_aside(out / run.name, "failed")


def _start(run: PlannedRun, out: Path, options: SweepOptions) -> _Started:
    """In a session of its own: Ctrl-C reaches this process alone, which then asks the run to save."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "120"}
    if options.jobs > 1:
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads} | environment
    command = [sys.executable, "-m", one_run.__name__, str(out), run.name, options.backend, options.device]
    with _log(out, run).open("ab") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    return _Started(run, process, time.monotonic())


def _interrupt(running: list[_Started], console: Console) -> None:
    """Ask once, and wait: a second signal would end the runs before they have saved."""
    console.line(f"waiting for {len(running)} runs to save; another Ctrl-C ends at once")
    for started in running:
        started.process.send_signal(signal.SIGINT)
    for started in running:
        started.process.wait()


def _finish(started: _Started, out: Path, interrupted: bool) -> None:
    """Write down why a run failed; one that a signal stopped did not."""
    code, folder = started.process.returncode, out / started.run.name
    if code == 0 or interrupted or code >= 128 or code in (-signal.SIGINT, -signal.SIGTERM):
        return
    lines = [line for line in _log(out, started.run).read_text(encoding="utf-8", errors="replace").splitlines() if line]
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else (lines[-1] if lines else "no word in its log")
    make_folder(folder)
    with replacing(folder / FAILURE) as partial:
        partial.write_text(json.dumps({"reason": reason.strip(), "exit_code": code}) + "\n", encoding="utf-8")


def _verdict(row: dict[str, Any]) -> str:
    if row["status"] == "finished":
        return f"validation loss {row['validation_loss']:.4f}"
    return f"{row['status']}: {row['reason']}" if row["reason"] else str(row["status"])


def _log(out: Path, run: PlannedRun) -> Path:
    return out / LOGS / f"{run.name}.txt"
