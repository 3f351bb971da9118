"""Every way in which a run can end from outside, as real processes: what was trained is saved, or the run goes on."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.short_runs import SIZE, short_run, start

import mlx_moe as mm
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training import run as training_run
from mlx_moe.training.run import open_run
from mlx_moe.training.stopping import TrainingStopped

ROOT = Path(__file__).parents[2]
WORDS = [
    *(sys.executable, "-m", "cli", "train", "--preset", "demo", *(f"-o{override}" for override in SIZE)),
    *(
        "-o",
        "training.checkpoint_every=100000",
        "-o",
        "training.eval_every=100000",
        "--backend",
        "torch",
        "--phases",
        "1",
    ),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def begin(run, cache, steps, **options):
    environment = os.environ | {"MLXMOE_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})
    return subprocess.Popen([*WORDS, "--steps", str(steps), "--out", run], env=environment, **options)


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 60
    while len(jsonl.read(run / "metrics.jsonl")) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(number, cache, tmp_path):
    process = begin(tmp_path / "run", cache, 100_000, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    saved = checkpoint.latest(tmp_path / "run")
    assert int(saved.name.removeprefix("step-")) == jsonl.read(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert f"{number.name}: stopped after step" in said


def test_nohup_goes_on(cache, tmp_path):
    process = begin(
        tmp_path / "run", cache, 40, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_reader_that_is_gone_stops_nothing(cache, tmp_path):
    """As `| head` does."""
    process = begin(tmp_path / "run", cache, 30, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process.stdout, process.stderr:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-30"


def test_a_reader_that_is_gone_ends_generation(tmp_path):
    """A million tokens would take minutes that nobody waits for."""
    data = mm.tokens(["One day a cat ran far away."] * 20, "char")
    size = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context_length": 16}
    models = (mm.create("llama", data, **size, seed=seed) for seed in range(20))
    model = next(model for model in models if len(mm.generate(model, None, "One", 500, temperature=0)) >= 500)
    mm.save(model, tmp_path / "model")
    words = ["generate", tmp_path / "model", "--prompt", "One", "--temperature", "0", "-n", "1000000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "cli", *words], env=environment, stdout=subprocess.PIPE)
    with process.stdout:
        process.stdout.read(10)
    assert process.wait(timeout=60) == 0


def test_a_log_on_a_full_disk_stops_nothing(cache, tmp_path):
    with open("/dev/full", "w") as full:
        process = begin(tmp_path / "run", cache, 10, stdout=full, stderr=full)
        assert process.wait(timeout=60) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-10"


def test_streams_that_are_closed_stop_nothing(cache, tmp_path):
    process = begin(tmp_path / "run", cache, 4, preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1, 2)])
    assert process.wait(timeout=60) == 0
    assert checkpoint.latest(tmp_path / "run").name == "step-4"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_of_another_encoding_stops_nothing(encoding, cache, tmp_path):
    words = ["--phases", "2", "-o", "phases.moe.steps=2"]
    environment = os.environ | {"MLXMOE_CACHE": str(cache), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    result = subprocess.run(
        [*WORDS, "--steps", "2", "--out", tmp_path / "run", *words],
        env=environment, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert rb"max |\u0394logit|" in result.stdout


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_memory_that_runs_out_is_one_line(backend, cache, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    words = ["-o", "training.batch_size=40000", "-o", "model.d_model=256", "--backend", backend]
    environment = os.environ | {"MLXMOE_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*WORDS, "--steps", "2", "--out", tmp_path / "run", *words],
        env=environment, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "phase 1 will need about" in result.stderr
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in result.stderr
    assert "batch_size" in result.stderr


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_limit_of_memory_that_suffices_is_enough(backend, cache, tmp_path):
    words = [*WORDS, "--steps", "2", "--out", tmp_path / "run", "--backend", backend]
    environment = os.environ | {"MLXMOE_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def train(limit):
        options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
        limited = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # noqa: E731
        return subprocess.run(words, env=environment, preexec_fn=limited, **options)

    result = train(500 << 20)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"{backend} needs" in result.stderr
    assert not (tmp_path / "run").exists()
    result = train(2 << 30)
    assert result.returncode == 0, result.stderr
    assert "everything is in" in result.stdout


def test_memory_that_runs_out_while_training_keeps_what_was_saved(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    start(short_run(), tmp_path / "run", n_phases=1)
    monkeypatch.setattr(training_run, "certify", refused)
    with pytest.raises(TrainingStopped) as caught:
        start(open_run(tmp_path / "run"), tmp_path / "run", n_phases=2)
    assert caught.value.exit_code == 1
    for text in ("out of memory at boundary 1-2", "step-12", "mlxmoe plan"):
        assert text in str(caught.value)
