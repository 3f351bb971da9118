"""`kill -9` at random moments, on real processes: three here, fifty by `benchmarks/kill.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", ["import", "export"])
def test_kills_leave_no_half_and_nothing_over(what):
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill.py", "--what", what, "--kills", "3"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["faults"] == []
    assert sum(values["kills"].values()) == 3
