"""What a stopped run prints goes on with that run: its backend, phases, threads, and nothing else."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.short_runs import PHASES, SIZE

from mlx_moe.storage import checkpoint, jsonl

MLXMOE = [sys.executable, "-m", "cli"]
ROOT = Path(__file__).parents[2]
BEGIN = ["train", "--preset", "demo", *(f"-o{override}" for override in SIZE), "--steps", "6"]
TIMING = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def environment(cache, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return kept | {"MLXMOE_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | variables


def mlxmoe(cache, words, **variables):
    result = subprocess.run(
        [*MLXMOE, *words], env=environment(cache, **variables), capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in result.stderr
    return result


def printed(message):
    """The words of the command that a message names, after `mlxmoe`."""
    found = re.search(r"resume with: (mlxmoe train --resume .*)$", message, re.MULTILINE)
    assert found, message
    return shlex.split(found[1])[1:]


def stopped_in(run, cache, words, step, **variables):
    """Begin a run and stop it by SIGTERM once a step is logged; what it printed on standard error."""
    process = subprocess.Popen(
        [*MLXMOE, *words, "--out", run], env=environment(cache, **variables), stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while step not in [(row["phase"], row["step"]) for row in jsonl.read(run / "metrics.jsonl")]:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    return message


def assert_equal(one, other):
    for name in ("metrics.jsonl", "history.jsonl"):
        rows = [
            [{key: value for key, value in row.items() if key not in TIMING} for row in jsonl.read(run / name)]
            for run in (one, other)
        ]
        assert rows[0] == rows[1]
    assert checkpoint.latest(one).relative_to(one) == checkpoint.latest(other).relative_to(other)
    weights = [checkpoint.load(run).weights for run in (one, other)]
    for name, array in weights[0].items():
        assert array.tobytes() == weights[1][name].tobytes(), name


SCRATCH = ["-o", "model.moe.n_experts=4", "-o", "model.moe.top_k=2"]


@pytest.mark.parametrize(
    ("backend", "phases", "threads", "more"),
    [("mlx", "1", "1", []), ("torch", "2", "2", []), ("mlx", "2", "2", []), ("torch", "1", "1", SCRATCH)],
    ids=["mlx, dense, 1 thread", "torch, experts, 2 threads", "mlx, experts, 2 threads", "torch, experts from scratch"],
)
def test_as_printed_it_is_the_same_run_bit_for_bit(backend, phases, threads, more, cache, tmp_path):
    words = [*BEGIN, *more, "--backend", backend, "--phases", phases]
    last = int(phases)
    whole, pieces = tmp_path / "whole", tmp_path / "in pieces; $x"
    assert mlxmoe(cache, [*words, "--out", whole], OMP_NUM_THREADS=threads).returncode == 0
    message = stopped_in(
        pieces, cache, [*words, "-o", "training.checkpoint_every=100"], (last, 2), OMP_NUM_THREADS=threads
    )
    result = mlxmoe(cache, printed(message))
    assert result.returncode == 0, result.stderr
    assert "not bit for bit" not in result.stdout
    assert f"backend    {backend}" in result.stdout
    assert not (pieces / "phases" / PHASES[last + 1]).exists()
    assert_equal(whole, pieces)


def test_a_finished_run_goes_no_further_than_it_was_to(cache, tmp_path):
    run = tmp_path / "run"
    assert mlxmoe(cache, [*BEGIN, "--backend", "torch", "--phases", "1", "--out", run]).returncode == 0
    before = {file: file.read_bytes() for file in run.rglob("*.safetensors")}
    assert mlxmoe(cache, ["train", "--resume", run]).returncode == 0
    assert {file: file.read_bytes() for file in run.rglob("*.safetensors")} == before
    result = mlxmoe(cache, ["train", "--resume", run, "--phases", "2"])
    assert result.returncode == 0, result.stderr
    assert (run / "phases" / "2-moe").is_dir()
    assert json.loads((run / "run.json").read_text())["last_phase"] == 2


def test_what_differs_is_said(cache, tmp_path):
    run = tmp_path / "run"
    words = [*BEGIN, "--backend", "torch", "--phases", "1", "-o", "training.checkpoint_every=2"]
    stopped_in(run, cache, words, (1, 2), OMP_NUM_THREADS="2")
    result = mlxmoe(cache, ["train", "--resume", run], OMP_NUM_THREADS="1")
    assert result.returncode == 0
    (said,) = [line for line in result.stdout.splitlines() if "not bit for bit" in line]
    assert said.strip() == "not bit for bit: threads 1, was 2"
    again = mlxmoe(cache, ["train", "--resume", run, "--phases", "2"])  # it stays so, and stays said
    assert "not bit for bit: threads 1, was 2" in again.stdout
    identity = (run / "run.json").read_text()
    done = mlxmoe(cache, ["train", "--resume", run], OMP_NUM_THREADS="2")
    assert "phase 2: nothing left to train after step 6" in done.stdout
    assert (run / "run.json").read_text() == identity


def test_a_damaged_identity_is_one_line(cache, tmp_path):
    run = tmp_path / "run"
    assert mlxmoe(cache, [*BEGIN, "--backend", "torch", "--phases", "1", "--out", run]).returncode == 0
    for content in ("{}", "[", '{"backend": "jax"}', "[" * 10_000, '{"threads": ' + "9" * 5_000 + "}"):
        (run / "run.json").write_text(content)
        result = mlxmoe(cache, ["train", "--resume", run])
        assert result.returncode == 2
        assert "run.json" in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_run_whose_identity_is_gone_is_resumed_as_it_is_told(cache, tmp_path):
    run = tmp_path / "run"
    assert mlxmoe(cache, [*BEGIN, "--backend", "torch", "--phases", "1", "--out", run]).returncode == 0
    (run / "run.json").unlink()
    for told in ([], ["--phases", "2"], ["--backend", "torch"]):
        result = mlxmoe(cache, ["train", "--resume", run, *told])
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "run.json is missing" in result.stderr
        assert not (run / "phases" / "2-moe").exists()
    result = mlxmoe(cache, ["train", "--resume", run, "--backend", "torch", "--phases", "2"])
    assert result.returncode == 0, result.stderr
    assert (run / "phases" / "2-moe").is_dir()
    assert json.loads((run / "run.json").read_text())["last_phase"] == 2


def test_a_config_that_was_changed_is_said(cache, tmp_path):
    run = tmp_path / "run"
    stopped_in(run, cache, [*BEGIN, "--backend", "torch", "--phases", "1", "-o", "training.checkpoint_every=2"], (1, 2))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("weight_decay: 0.1", "weight_decay: 0.2"))
    result = mlxmoe(cache, ["train", "--resume", run])
    assert result.returncode == 0, result.stderr
    said = "config.yaml is not as it was when the run began: optimizer.weight_decay 0.2, was 0.1"
    assert said in " ".join(result.stdout.split())
    result = mlxmoe(cache, ["train", "--resume", run])
    assert "is not as it was" not in " ".join(result.stdout.split())
