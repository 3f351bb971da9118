"""Kill a run with SIGKILL at random moments, resume it each time, and compare what it comes to with a run left alone.

    python benchmarks/kill.py --backend torch --kills 50

Every fifth moment is drawn evenly over the length of a whole run, start-up included; the others over what is left to do
after it: training, saving, boundaries. A run that ends before its moment is checked, and another begun. Exit 0: every
run ended with the rows and the weights of the one left alone, to the last bit, and each resumption began at the latest
checkpoint that was whole. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training.phases import open_run

ROOT = Path(__file__).parents[1]
TIMING = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds"}
# A checkpoint after every step, so that saving takes a good share of the time.
RUN = [
    *("model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.context_length=16", "training.batch_size=4"),
    *("data.source=stories", "data.n_documents=60", "data.tokenizer=char", "data.validation_fraction=0.2"),
    *("phases.moe.n_experts=4", "phases.large_moe.d_model=96", "phases.large_moe.n_layers=3"),
    *("training.log_every=1", "training.eval_every=7", "training.eval_sequences=8", "training.checkpoint_every=1"),
]


@dataclass
class Result:
    backend: str
    kills: Counter[str] = field(default_factory=Counter)  # by what the run was doing
    runs: int = 0
    seconds_of_a_run: float = 0
    steps_lost: list[int] = field(default_factory=list)  # by each kill
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=["mlx", "torch"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of each phase")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill(options.backend, options.kills, options.steps, options.seed, Path(folder))
    show(result)
    return 1 if result.faults else 0


def kill(backend: str, n_kills: int, n_steps: int, seed: int, folder: Path) -> Result:
    """Begin runs, kill and resume them until `n_kills` are done and the last run has ended."""
    result, began = Result(backend), time.perf_counter()
    begin = ["--preset", "demo", "--steps", str(n_steps), *(word for override in RUN for word in ("-o", override))]
    whole = folder / "left-alone"
    seconds_after_start = Attempt(folder, backend, whole, begin).wait()
    result.seconds_of_a_run = time.perf_counter() - began
    moments = random.Random(seed)
    while sum(result.kills.values()) < n_kills:
        run = folder / f"run-{result.runs}"
        ended = False
        while not ended:
            attempt = Attempt(folder, backend, run, begin)
            done = sum(result.kills.values())
            if done == n_kills:
                ended = attempt.ends_within(None)
            elif done % 5 == 4:
                ended = attempt.ends_within(moments.uniform(0, result.seconds_of_a_run))
            else:
                attempt.await_start()
                ended = attempt.ends_within(moments.uniform(0, attempt.share_left() * seconds_after_start))
            if not ended:
                result.kills[attempt.doing()] += 1
                result.steps_lost.append(attempt.steps_lost())
            result.faults += attempt.faults
            if attempt.faults:
                return result
        result.runs += 1
        result.faults += differences(run, whole)
    return result


class Attempt:
    """One process that begins or resumes a run."""

    def __init__(self, folder: Path, backend: str, run: Path, begin: list[str]):
        self.run = run
        self.began = (run / "config.yaml").exists()
        self.latest = checkpoint.latest(run)
        self.environment = _modified(run / "environment.json")
        self.faults: list[str] = []
        self.said = folder / "said.txt"
        arguments = ["--resume", str(run)] if self.began else [*begin, "--out", str(run)]
        command = [sys.executable, "-m", "cli", "train", *arguments, "--backend", backend, "--device", "cpu"]
        environment = os.environ | {"MLXMOE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)

    def wait(self) -> float:
        """Let it end; the seconds it took after its start."""
        self.await_start()
        began = time.perf_counter()
        if self.process.wait() != 0:
            raise SystemExit(f"the run that is left alone failed:\n{self.said.read_text()}")
        return time.perf_counter() - began

    def await_start(self) -> None:
        while self.is_starting() and self.process.poll() is None:
            time.sleep(0.002)

    def share_left(self) -> float:
        """Of the steps of all phases."""
        if self.latest is None:
            return 1.0
        phase, step = _position(self.latest)
        return 1 - (phase - 1 + step / open_run(self.run).phases.dense.steps) / 3

    def is_starting(self) -> bool:
        return _modified(self.run / "environment.json") == self.environment

    def ends_within(self, seconds: float | None) -> bool:
        """Whether it came to its end; else it is killed."""
        try:
            exit_code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            exit_code = self.process.wait()
        text = self.said.read_text()
        if exit_code not in (0, -signal.SIGKILL) or "warning" in text:
            self.faults.append(f"exit code {exit_code} of {self.run.name}: {text[-500:]}")
        if self.latest and "resuming from" in text and f"from {self.latest.relative_to(self.run)}\n" not in text:
            self.faults.append(f"{self.run.name} was not resumed from {self.latest}: {text[-500:]}")
        return exit_code == 0

    def doing(self) -> str:
        """What the process did when it was killed, by what it left."""
        if any(self.run.glob("phases/*/checkpoints/.*")):
            return "saving a checkpoint"
        if _modified(self.run / "environment.json") == self.environment:
            return "starting"
        latest = checkpoint.latest(self.run)
        if (latest and latest.name == f"step-{self.steps_of_phase()}") or any(self.run.glob("**/.*.partial")):
            return "between phases"
        return "training"

    def steps_of_phase(self) -> int:

        return open_run(self.run).phases.dense.steps

    def steps_lost(self) -> int:
        rows, latest = jsonl.read(self.run / "metrics.jsonl"), checkpoint.latest(self.run)
        if not rows or latest is None:
            return len(rows)
        return sum((row["phase"], row["step"]) > _position(latest) for row in rows)


def differences(run: Path, whole: Path) -> list[str]:
    """In what two finished runs differ, but for times."""
    faults = []
    for name in ("metrics.jsonl", "history.jsonl"):
        if untimed(jsonl.read(run / name)) != untimed(jsonl.read(whole / name)):
            faults.append(f"{run.name}: {name} differs")
    moments = [(row["phase"], row["step"]) for row in jsonl.read(run / "metrics.jsonl")]
    if len(moments) != len(set(moments)):
        faults.append(f"{run.name}: a step is in metrics.jsonl twice")
    if (run / "samples.md").read_text() != (whole / "samples.md").read_text():
        faults.append(f"{run.name}: samples.md differs")
    one, other = checkpoint.load(run), checkpoint.load(whole)
    for arrays in ("weights", "optimizer_state"):
        for name, array in getattr(one, arrays).items():
            if array.tobytes() != getattr(other, arrays)[name].tobytes():
                faults.append(f"{run.name}: {name} of the {arrays} differs")
    if left := [str(path) for path in run.rglob(".*")]:
        faults.append(f"{run.name}: left over: {left}")
    return faults


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def show(result: Result) -> None:
    for name, count in result.kills.most_common():
        print(f"{name:<24}{count:>4} kills")
    print(f"{'runs brought to an end':<24}{result.runs:>4}, {result.seconds_of_a_run:.1f} s each when left alone")
    print(f"{'steps done again':<24}{max(result.steps_lost, default=0):>4} at most after a kill")
    print(f"{'faults':<24}{len(result.faults):>4}")
    for fault in result.faults:
        print(f"  {fault}")
    values = vars(result) | {"kills": dict(result.kills), "steps_lost": max(result.steps_lost, default=0)}
    print(json.dumps(values | {"seconds_of_a_run": round(result.seconds_of_a_run, 1)}))


def _position(saved: Path) -> tuple[int, int]:
    """Phase and step of a checkpoint's folder."""
    return int(saved.parts[-3][0]), int(saved.name.removeprefix("step-"))


def _modified(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
