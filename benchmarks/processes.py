"""Two processes against one, on the same global batches: losses of every step, through all three phases.

    python benchmarks/processes.py [--steps 20]

Runs `mlxmoe train` alone, under `torchrun` with each strategy, and under `mlx.launch` over a ring, all on this machine,
and prints the largest difference of a loss from the single process. The limit is 1e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent
LIMIT = 1e-5
RUNS = {
    "torch, 2 x ddp": ("torch", "ddp"),
    "torch, 2 x zero1": ("torch", "zero1"),
    "torch, 2 x fsdp": ("torch", "fsdp"),
    "mlx, 2 x ring": ("mlx", "ddp"),
}
LAUNCH = {
    "torch": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"],
    "mlx": [BIN / "mlx.launch", "-n", "2", "--backend", "ring"],
}
SIZE = [
    *("model.d_model=64", "model.n_layers=2", "model.context_length=64", "phases.large_moe.d_model=96"),
    *("phases.large_moe.n_layers=3", "training.batch_size=8", "training.log_every=1", "training.eval_every=10"),
    *("data.n_documents=500", "phases.moe.n_experts=4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each phase")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        alone = {backend: losses(Path(folder) / backend, backend, None, steps) for backend in LAUNCH}
        found = {
            name: difference(losses(Path(folder) / name.replace(" ", ""), backend, strategy, steps), alone[backend])
            for name, (backend, strategy) in RUNS.items()
        }
    print(json.dumps(found))
    for name, value in found.items():
        verdict = "ok" if value < LIMIT else "FAILED"
        print(f"{name:18} max |Δloss| over {steps} steps of each phase: {value:.1e}  {verdict}")
    sys.exit(max(found.values()) >= LIMIT)


def losses(out: Path, backend: str, strategy: str | None, steps: int) -> dict[tuple[int, int], list[float]]:
    """Return a run's loss, cross entropy and, if present, validation loss of every step."""
    launch = [*LAUNCH[backend]] if strategy else []
    overrides = [f"-o{override}" for override in [*SIZE, f"engine.strategy={strategy or 'ddp'}"]]
    command = [*launch, BIN / "mlxmoe", "train", "--preset", "demo", "--steps", str(steps), "--out", out, *overrides]
    chosen = [] if strategy else ["--backend", backend]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([*command, *chosen], capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "cross_entropy", "validation_loss")
    return {(row["phase"], row["step"]): [row[name] for name in names if name in row] for row in rows}


def difference(one: dict[tuple[int, int], list[float]], other: dict[tuple[int, int], list[float]]) -> float:
    assert one.keys() == other.keys()
    return max(abs(a - b) for step in one for a, b in zip(one[step], other[step], strict=True))


if __name__ == "__main__":
    main()
