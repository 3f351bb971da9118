"""Several processes, as their launchers start them, against one: the same losses, and either goes on from the other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_moe.errors import InputError
from mlx_moe.presets import load_run
from mlx_moe.processes import SingleProcess
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.request import Options
from mlx_moe.training.run import prepare_experiment

BIN = Path(sys.executable).parent
LAUNCH = {
    "torch": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", BIN / "mlxmoe"],
    "mlx": [BIN / "mlx.launch", "-n", "2", "--backend", "ring", BIN / "mlxmoe"],
}
SMALL = [
    *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.context_length=32", "data.n_documents=200"),
    *("phases.moe.n_experts=4", "phases.large_moe.d_model=48", "phases.large_moe.n_layers=3"),
    *("training.batch_size=8", "training.log_every=1", "training.eval_every=2", "training.eval_sequences=6"),
]
LIMIT = 1e-5


def arguments(out, *overrides, steps=4):
    options = [f"-o{override}" for override in (*SMALL, *overrides)]
    return ["train", "--preset", "demo", "--tokenizer", "char", "--steps", str(steps), "--out", out, *options]


def environment(cache):
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "MLXMOE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def launched(backend, cache, *words):
    command = [*map(str, LAUNCH[backend]), *map(str, words)]
    result = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(one, other):
    assert [(row["phase"], row["step"]) for row in one] == [(row["phase"], row["step"]) for row in other]
    for name in ("loss", "cross_entropy", "validation_loss", "grad_norm"):
        for left, right in zip(one, other, strict=True):
            assert left.get(name) == pytest.approx(right.get(name), abs=LIMIT), (name, left["phase"], left["step"])
    for left, right in zip(one, other, strict=True):
        if "expert_load" in left:  # over the global batch, so not just alike
            assert left["expert_load"] == right["expert_load"]


@pytest.mark.parametrize(
    ("backend", "strategy", "overrides"),
    [
        ("torch", "ddp", ["engine.accumulation_steps=2"]),
        ("torch", "zero1", []),
        ("torch", "fsdp", ["optimizer.name=muon"]),
        ("mlx", "ddp", []),
    ],
    ids=["ddp-in-parts", "zero1", "fsdp-muon", "ring"],
)
def test_one_begins_two_go_on_one_ends(mlxmoe, tmp_path, backend, strategy, overrides):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    overrides = [f"engine.strategy={strategy}", *overrides]
    assert mlxmoe(*arguments(alone, *overrides), "--backend", backend).code == 0
    assert mlxmoe(*arguments(shared, *overrides), "--backend", backend, "--phases", 1).code == 0
    said = " ".join(launched(backend, tmp_path / "cache", "train", "--resume", shared, "--phases", "2").split())
    assert f"2 processes, {strategy}" in said
    assert "not bit for bit: " in said
    assert "processes 2, was 1" in said, said
    assert said.count("Phase 2: mixture of experts, results") == 1
    assert mlxmoe("train", "--resume", shared, "--phases", "3").code == 0
    assert_same_losses(rows(alone), rows(shared))


def test_a_signal_stops_all_after_the_same_step(tmp_path):
    out = tmp_path / "run"
    command = [*map(str, LAUNCH["torch"]), *map(str, arguments(out, "training.eval_every=10000", steps=100_000))]
    process = subprocess.Popen(
        command, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 5:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    checkpoints = list((out / "phases/1-dense/checkpoints").glob("step-*"))
    assert len(checkpoints) == 1, said
    step = int(checkpoints[0].name.removeprefix("step-"))
    assert rows(out)[-1]["step"] == step
    assert f"SIGTERM: stopped after step {step} of phase 1 and saved" in said


def test_a_batch_must_come_in_equal_shares(tmp_path):
    run = load_run("demo", overrides=["training.batch_size=12", "engine.accumulation_steps=4"])
    folder = RunFolder(tmp_path / "run", SingleProcess(size=2))
    with pytest.raises(InputError, match=r"batch_size 12 does not come in 8 equal parts: 2 processes times .* take 16"):
        prepare_experiment(run, folder, choose_backend("torch"), 3, Options(), Console(quiet=True))
    assert not folder.path.exists()


@pytest.mark.parametrize(("size", "said"), [("2", "RANK is not"), ("x", "which is no number"), ("9" * 30, "no number")])
def test_half_an_environment_of_a_launcher(size, said, tmp_path):
    command = [BIN / "mlxmoe", "train", "--backend", "torch", "--preset", "demo", "--out", tmp_path / "run"]
    ended = subprocess.run(command, env=os.environ | {"WORLD_SIZE": size}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_meet(tmp_path):
    command = [BIN / "mlxmoe", "train", "--backend", "torch", "--preset", "demo", "--out", tmp_path / "run"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}
    ended = subprocess.run(command, env=os.environ | place, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "cannot meet the other processes at '127.0.0.1:x'" in ended.stderr
    assert not (tmp_path / "run").exists()
