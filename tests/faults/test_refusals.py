"""The list of bad inputs for real commands: a few here, all by `benchmarks/refusals.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("only", "n_rows"), [("fit:", 4), ("report: a row without", 1), ("cache: another", 1)])
def test_rows_of_the_list(only, n_rows):
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "refusals.py", "--only", only, "--limit", "60"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{n_rows} rows, 0 faults" in result.stdout
