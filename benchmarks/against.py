"""Compare this checkout with another one: start-up of commands, and training steps.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--rounds 20] [--steps 200]

Both run with this Python, each from its own folder, alternately: whole commands, and two runs, one of which is halted
while the other does five steps, so that other load affects both. Prints the ratios of the medians and of the lower
quartiles, and JSON; below 1, this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parents[1]
COMMANDS = {
    "--help": ["-m", "cli", "--help"],
    "train --help": ["-m", "cli", "train", "--help"],
    "params": ["-m", "cli", "params", "--preset", "demo"],
    "the MLX backend": ["-c", "import mlx_moe.model.trainer"],
    "the PyTorch backend": ["-c", "import torch_ref.trainer"],
}
AT_ONCE = 5  # steps per measurement
POLL_SECONDS = 0.001
T = TypeVar("T")
Seconds = defaultdict[tuple[str, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=20, help="of the commands")
    parser.add_argument(
        "--steps", type=int, default=200, help="of a run of each backend: one phase of the demo's model"
    )
    options = parser.parse_args()
    checkouts = {"this": HERE, "other": options.other.resolve()}
    seconds: Seconds = defaultdict(list)
    for a_round in range(-1, options.rounds):
        for name, command in COMMANDS.items():
            for which, checkout in _in_turn(checkouts, a_round):
                taken = _run(checkout, command)
                if a_round >= 0:
                    seconds[name, which].append(taken)
    for backend in ("mlx", "torch"):
        with tempfile.TemporaryDirectory() as folder:
            runs = {
                which: _Run(path, Path(folder) / which, backend, options.steps) for which, path in checkouts.items()
            }
            for a_round in range(options.steps // AT_ONCE - 2):
                for which, run in _in_turn(runs, a_round):
                    seconds[f"{AT_ONCE} steps, {backend}", which].append(run.next_steps())
            for run in runs.values():
                run.end()
    _show(seconds)


def _in_turn(both: dict[str, T], a_round: int) -> list[tuple[str, T]]:
    """Return the items, alternating which goes first from round to round."""
    return list(both.items())[:: 1 if a_round % 2 else -1]


def _run(checkout: Path, command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], cwd=checkout, env=_environment(checkout), check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def _environment(checkout: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {"PYTHONPATH": str(checkout)}  # with compiled files, as after a user's first start


class _Run:
    """A checkout's run, halted except while its next steps are timed."""

    def __init__(self, checkout: Path, folder: Path, backend: str, steps: int):
        settings = {"phases.dense.steps": steps, "training.log_every": AT_ONCE}
        settings |= dict.fromkeys(("training.eval_every", "training.checkpoint_every"), steps)
        command = [sys.executable, "-m", "cli", "train", "--phases", "1", "--preset", "demo", "--backend", backend]
        command += [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        self._rows = folder / "metrics.jsonl"
        self._process = subprocess.Popen(
            [*command, "--out", folder], cwd=checkout, env=_environment(checkout), stdout=subprocess.DEVNULL
        )
        self._await_row()  # the first step's row
        self.next_steps()

    def next_steps(self) -> float:
        """Return the seconds until the next row of the log."""
        start = time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        return self._await_row() - start

    def _await_row(self) -> float:
        """Halt the run at its next row; return the time of that."""
        before = self._size()
        while self._size() == before:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._rows.parent} ended with {self._process.returncode}")
            time.sleep(POLL_SECONDS)
        self._process.send_signal(signal.SIGSTOP)
        return time.perf_counter()

    def _size(self) -> int:
        return self._rows.stat().st_size if self._rows.exists() else 0

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


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
