"""The seeded losses of a small run. A change of numerics shows here, on either backend, and is then made on purpose:

    UPDATE_GOLDEN=1 pytest tests/golden

rewrites `losses.json`; the commit message states the losses before and after.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mlx_moe.storage import jsonl

GOLDEN = Path(__file__).parent / "losses.json"
RUN = [
    *("train", "--preset", "demo", "--data", "stories", "--tokenizer", "bpe:300", "--steps", "8"),
    *("-o", "data.n_documents=100", "-o", "model.d_model=32", "-o", "model.n_layers=2", "-o", "model.n_heads=2"),
    *("-o", "model.context_length=32", "-o", "training.batch_size=4", "-o", "training.log_every=1"),
    *("-o", "phases.large_moe.d_model=48", "-o", "phases.large_moe.n_layers=3", "-o", "phases.moe.n_experts=4"),
]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_losses_are_those_of_the_record(backend, mlxmoe, tmp_path):
    result = mlxmoe(*RUN, "--backend", backend, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    rows = [row for row in jsonl.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    losses = {f"phase {phase}": [round(row["loss"], 6) for row in rows if row["phase"] == phase] for phase in (1, 2, 3)}
    if os.environ.get("UPDATE_GOLDEN") and backend == "torch":
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for phase, expected in golden.items():
        # Wide enough for another CPU's rounding over 24 steps, far below what one step changes.
        np.testing.assert_allclose(losses[phase], expected, atol=1e-4, err_msg=phase)
