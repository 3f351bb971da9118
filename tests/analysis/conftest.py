"""Runs of a second: three phases, one phase, one that was interrupted."""

import signal

import pytest
from support.short_runs import AfterStep, short_run, start

from mlx_moe.training.stopping import TrainingStopped


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    start(short_run(), folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    start(short_run(), folder, n_phases=1)
    return folder


@pytest.fixture
def interrupted(tmp_path):
    """Stopped after five steps of phase 2."""
    folder = tmp_path / "interrupted"
    with pytest.raises(TrainingStopped):
        start(short_run(), folder, console=AfterStep((2, 5), lambda: signal.raise_signal(signal.SIGINT)))
    return folder
