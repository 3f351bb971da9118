"""Presets of other sequences than dense, experts, larger experts: certified, interrupted and resumed in each phase."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.short_runs import AfterStep, assert_same_run, start

from mlx_moe.phases import get_phases
from mlx_moe.presets import load_run
from mlx_moe.training.stopping import TrainingStopped

SIZE = [
    *("model.d_model=24", "model.n_layers=2", "model.n_heads=2", "model.context_length=16", "model.dropout=0.1"),
    *("data.source=stories", "data.n_documents=60", "data.tokenizer=char", "data.validation_fraction=0.2"),
    *("training.batch_size=4", "training.log_every=1", "training.eval_every=3", "training.checkpoint_every=3"),
    *("training.eval_sequences=8", "training.keep_checkpoints=1"),
]
ROOT = Path(__file__).parents[2]
UNTIL_KILLED = """
import sys
import conftest  # loads what these tests load, in their order, for the same BLAS
from training.test_sequences import train_until_killed
train_until_killed(*sys.argv[1:])
"""
SEQUENCES = {
    "grow-first": ["phases.large.d_model=32", "phases.large.n_layers=3", "phases.moe.n_experts=4"],
    "grow-twice": [
        *("phases.medium.d_model=32", "phases.medium.n_layers=3", "phases.large.d_model=40", "phases.large.n_layers=4"),
        "phases.moe.n_experts=4",
    ],
    "dense-only": [],
}


def short(preset):
    return load_run(preset, None, [*SIZE, *SEQUENCES[preset]], steps=5)


@pytest.fixture(scope="module", params=[(preset, backend) for preset in SEQUENCES for backend in ("mlx", "torch")])
def finished(request, tmp_path_factory):
    preset, backend = request.param
    directory = tmp_path_factory.mktemp(f"{preset}-{backend}") / "run"
    run = short(preset)
    start(run, directory, backend, n_phases=len(run.phases))
    return run, directory, backend


def test_every_boundary_is_lossless(finished):
    run, directory, _ = finished
    numbers = [phase.number for phase in get_phases(run)]
    names = [f"{before}-{after}" for before, after in pairwise(numbers)]
    assert sorted(path.stem for path in (directory / "boundaries").glob("*.json")) == names
    for name in names:
        assert json.loads((directory / "boundaries" / f"{name}.json").read_text())["passed"]


def test_interrupted_in_each_phase_it_ends_the_same(finished, tmp_path):
    run, whole, backend = finished
    for phase in get_phases(run):
        console = AfterStep((phase.number, 2), lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TrainingStopped):
            start(run, tmp_path / "run", backend, console, n_phases=len(run.phases))
    start(run, tmp_path / "run", backend, n_phases=len(run.phases))
    assert_same_run(whole, tmp_path / "run")


def test_killed_in_each_phase_it_ends_the_same(finished, tmp_path):
    """A real process, ended by `kill -9` one step after a checkpoint of each phase."""
    run, whole, backend = finished
    preset = whole.parent.name.partition(f"-{backend}")[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for phase in get_phases(run):
        arguments = [preset, backend, str(phase.number), str(tmp_path / "run")]
        result = subprocess.run([sys.executable, "-c", UNTIL_KILLED, *arguments], env=environment, check=False)
        assert result.returncode == -signal.SIGKILL
    start(run, tmp_path / "run", backend, n_phases=len(run.phases))
    assert_same_run(whole, tmp_path / "run")


def train_until_killed(preset, backend, phase, directory):
    run = short(preset)
    console = AfterStep((int(phase), 4), lambda: os.kill(os.getpid(), signal.SIGKILL))
    start(run, Path(directory), backend, console, n_phases=len(run.phases))


def test_every_tool_takes_it(finished, mlxmoe):
    run, directory, backend = finished
    for command in ("report", "plot"):
        result = mlxmoe(command, directory)
        assert result.code == 0, result.err
    assert mlxmoe("compare", directory, directory).code == 0
    assert mlxmoe("plan", "--config", directory / "config.yaml").code == 0
    result = mlxmoe("experts", directory, "--backend", backend)
    has_experts = any(phase.model.moe for phase in get_phases(run))
    assert result.code == (0 if has_experts else 2), result.err
    page = (directory / "report.html").read_text()
    for phase in get_phases(run):
        assert phase.label in page
