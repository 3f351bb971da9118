"""This checkout beside another one: what a user waits for at the start of a command, and in a step of training.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--rounds 20] [--pairs 5] [--steps 60]

Both run with this Python, each from its own folder, in turns. Prints for each command and each backend the ratio of the
medians, that of the lower quartiles, which what else the machine does moves less, and JSON; below 1, this checkout is
the faster one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parents[1]
COMMANDS = {
    "--help": ["-m", "cli", "--help"],
    "train --help": ["-m", "cli", "train", "--help"],
    "params": ["-m", "cli", "params", "--preset", "demo"],
    "the MLX backend": ["-c", "import mlx_moe.model.trainer"],
    "the PyTorch backend": ["-c", "import torch_ref.trainer"],
}
STEPS_A_ROW = 5
Seconds = defaultdict[tuple[str, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=20, help="of the commands")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each checkout and backend")
    parser.add_argument("--steps", type=int, default=60, help="of a run: one phase of the demo's model")
    options = parser.parse_args()
    checkouts = {"this": HERE, "other": options.other.resolve()}
    seconds: Seconds = defaultdict(list)
    for a_round in range(-1, options.rounds):
        for name, command in COMMANDS.items():
            for which, checkout in _in_turn(checkouts, a_round):
                taken = _run(checkout, command)
                if a_round >= 0:
                    seconds[name, which].append(taken)
    for a_pair in range(options.pairs):
        for backend in ("mlx", "torch"):
            for which, checkout in _in_turn(checkouts, a_pair):
                whole, steps = _train(checkout, backend, options.steps)
                seconds[f"training, {backend}", which].append(whole)
                seconds[f"a step, {backend}", which] += steps
    _show(seconds)


def _in_turn(checkouts: dict[str, Path], a_round: int) -> list[tuple[str, Path]]:
    """Who goes first changes from round to round."""
    return list(checkouts.items())[:: 1 if a_round % 2 else -1]


def _run(checkout: Path, command: list[str]) -> float:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _train(checkout: Path, backend: str, steps: int) -> tuple[float, list[float]]:
    """Seconds of a run, and of a step in each row of its metrics but for the first quarter."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ["-m", "cli", "train", "--phases", "1", "--preset", "demo", "--backend", backend, "--out", str(run)]
        command += ["-o", f"phases.dense.steps={steps}", "-o", f"training.log_every={STEPS_A_ROW}"]
        whole = _run(checkout, command)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return whole, [row["step_ms"] / 1e3 for row in rows if "step_ms" in row][steps // STEPS_A_ROW // 4 :]


def _show(seconds: Seconds) -> None:
    ratios = {}
    for name in dict.fromkeys(name for name, _ in seconds):
        this, other = (sorted(seconds[name, which]) for which in ("this", "other"))
        median, quartile = (this[len(this) // n] / other[len(other) // n] for n in (2, 4))
        ratios[name] = {"median": median, "lower quartile": quartile}
        both = f"{1e3 * this[len(this) // 2]:9.1f} ms {1e3 * other[len(other) // 2]:9.1f} ms"
        print(f"{name:20} {both}  {median:6.3f}  {quartile:6.3f}")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
