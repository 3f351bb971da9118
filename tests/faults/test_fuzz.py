"""Some hundred wrong files and options, the same ones each time; `make fuzz` tries new ones for ten minutes."""

import os
import subprocess
import sys
from pathlib import Path

CASES = int(os.environ.get("MLXMOE_FUZZ_CASES", "500"))


def test_every_wrong_input_is_taken_or_refused_in_a_line():
    words = ["--cases", str(CASES), "--seed", "1", "--workers", "2"]
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py"), *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
