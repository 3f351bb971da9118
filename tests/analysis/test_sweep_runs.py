import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from small_experiments import SIZE

from mlx_moe.storage import jsonl

SWEEP = {
    "name": "s",
    "preset": "demo",
    "overrides": {"phases.dense.steps": 6, "data.tokenizer": "bpe:300"},
    "axes": {
        "arm": {
            "good": {},
            "explodes": {"phases.dense.learning_rate": 1e30, "optimizer.max_grad_norm": 1e30},
            "long": {"phases.dense.steps": 800, "training.checkpoint_every": 800, "training.eval_every": 800},
        }
    },
}
OPTIONS = [*SIZE, "--backend", "torch", "--device", "cpu"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A sweep of which one run finished, one failed, and one was interrupted: (its file, its folder, the process)."""
    folder = tmp_path_factory.mktemp("sweep")
    file, out = folder / "s.yaml", folder / "out"
    file.write_text(yaml.safe_dump(SWEEP, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"MLXMOE_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "sweep", file, "--out", out, "--jobs", "2", *OPTIONS],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    others = (out / "good" / "phases", out / "explodes" / "failure.json", out / "long" / "metrics.jsonl")
    while process.poll() is None and not all(path.exists() for path in others):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    return file, out, process.returncode, said


def statuses(out):
    return {row["run"]: row["status"] for row in jsonl.read(out / "results.jsonl")}


def test_an_interrupted_sweep_says_how_it_stands(stopped):
    file, out, code, said = stopped
    assert code == 128 + signal.SIGINT, said
    assert "waiting for 1 run to save" in said
    assert f"resume with: mlxmoe sweep {file} -o model.d_model=32" in said
    assert f"--jobs 2 --out {out} --backend torch --device cpu" in said
    assert statuses(out) == {"good": "finished", "explodes": "failed", "long": "interrupted"}
    assert list((out / "long").glob("phases/*/checkpoints/step-*")), "the interrupted run did not save"


def test_a_failure_is_kept_and_named(stopped):
    _, out, _, said = stopped
    reason = json.loads((out / "explodes" / "failure.json").read_text())["reason"]
    assert "lower the learning rate" in reason
    assert f"explodes: failed: {reason}"[:60] in said.replace("\n", " ")


def test_going_on_runs_only_what_is_left(stopped, mlxmoe):
    file, out, *_ = stopped
    step = max(int(path.name[5:]) for path in (out / "long").glob("phases/*/checkpoints/step-*"))
    times = {path: path.stat().st_mtime_ns for path in (out / "good").rglob("*")}
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS)
    assert result.code == 1
    assert "1 of 3 runs did not finish: explodes" in result.err
    assert statuses(out) == {"good": "finished", "explodes": "failed", "long": "finished"}
    assert f"resuming from phases/1-dense/checkpoints/step-{step}" in (out / "logs" / "long.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in (out / "good").rglob("*")} == times


def test_another_sweep_does_not_mix_in(stopped, mlxmoe):
    file, out, *_ = stopped
    result = mlxmoe("sweep", file, "--out", out, *OPTIONS, "-o", "training.batch_size=2")
    assert result.code == 2
    assert "holds another sweep: good (3 such) has another config; name another --out" in result.err
    result = mlxmoe("sweep", file, "--out", out / "good", *OPTIONS)
    assert "is not empty and holds no sweep" in result.err


def test_a_dry_run_only_names(stopped, mlxmoe, tmp_path):
    result = mlxmoe("sweep", stopped[0], "--dry-run", "--out", tmp_path / "none")
    assert result.out.split() == ["good", "explodes", "long"]
    assert not (tmp_path / "none").exists()
