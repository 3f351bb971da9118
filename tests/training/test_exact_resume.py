"""A run interrupted twenty times, against one that never was: the same rows, the same weights, to the last bit."""

import random
import signal

import pytest
from support.short_runs import STEPS, AfterStep, assert_same_run, short_run, start

from mlx_moe.storage import checkpoint
from mlx_moe.training.run import open_run
from mlx_moe.training.stopping import TrainingStopped

MOMENTS = [(phase, step) for phase, n in STEPS.items() for step in range(1, n + 1)]


@pytest.mark.parametrize(("accumulation_steps", "interruptions"), [(1, 20), (2, 5)])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_interruptions_change_nothing(backend, accumulation_steps, interruptions, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    run = short_run(f"engine.accumulation_steps={accumulation_steps}")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    start(run, whole, backend)

    for n, moment in enumerate(sorted(random.Random(accumulation_steps).sample(MOMENTS, interruptions))):
        number = (signal.SIGINT, signal.SIGTERM)[n % 2]
        interrupt = AfterStep(moment, lambda number=number: signal.raise_signal(number))
        with pytest.raises(TrainingStopped) as caught:
            start(open_run(pieces) if n else run, pieces, backend, interrupt)
        assert caught.value.exit_code == 128 + number
        last = checkpoint.load(pieces).state
        assert (last.phase, last.step) == moment
    start(open_run(pieces), pieces, backend)
    assert_same_run(pieces, whole)
