"""`kill -9` at random moments, on real processes: two here, fifty by `benchmarks/kill.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("backend", "seed"), [("torch", 1), ("mlx", 2)])
def test_kills_lose_nothing_but_unsaved_steps(backend, seed):
    arguments = ["--backend", backend, "--kills", "2", "--steps", "8", "--seed", str(seed)]
    command = [sys.executable, ROOT / "benchmarks" / "kill.py", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["faults"] == []
    assert sum(values["kills"].values()) == 2
    assert values["runs"] >= 1
