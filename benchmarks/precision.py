"""Cost of half precision in loss: the demo's three phases in float32 and in halves, validation loss after each.

    python benchmarks/precision.py [--backend torch] [--precision bf16] [--preset demo] [--data FILE]

Runs the precisions in turn with the same seed, hence the same batches. Prints a table and JSON. The limit is a
difference of 0.02 nats at the end of each phase; exit code 0 if it holds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 0.02
MLXMOE = Path(sys.executable).parent / "mlxmoe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=["mlx", "torch"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data", help="the text; the preset's own without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        losses = {
            precision: validation_losses(Path(folder) / precision, options, precision)
            for precision in ("fp32", options.precision)
        }
    full, half = losses.values()
    differences = [abs(one - other) for one, other in zip(full, half, strict=True)]
    print(json.dumps({"backend": options.backend, **losses, "differences": differences}))
    print(f"{options.backend:12} " + "".join(f"{f'phase {n}':>10}" for n in (1, 2, 3)))
    for name, values in {**losses, "difference": differences}.items():
        print(f"{name:12} " + "".join(f"{value:10.4f}" for value in values))
    sys.exit(max(differences) > LIMIT)


def validation_losses(out: Path, options: argparse.Namespace, precision: str) -> list[float]:
    """Return the validation loss at the end of each phase, nats per token."""
    command = [MLXMOE, "train", "--preset", options.preset, "--backend", options.backend, "--out", out]
    command += ["-o", f"engine.precision={precision}", *(["--data", options.data] if options.data else [])]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["last_validation_loss"] for row in rows if row["event"] == "phase"]


if __name__ == "__main__":
    main()
