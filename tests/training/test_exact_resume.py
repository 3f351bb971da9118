"""A run interrupted twenty times, against one that never was: the same rows, the same weights, to the last bit."""

import contextlib
import random
import signal

import pytest

from mlx_moe.presets import load_run
from mlx_moe.training import checkpoint, log
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.phases import Options, open_run, train
from mlx_moe.training.stopping import TrainingStopped

STEPS = {1: 12, 2: 10, 3: 8}
MOMENTS = [(phase, step) for phase, n in STEPS.items() for step in range(1, n + 1)]
TIMING = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds"}
SIZE = [
    *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.context_length=16", "model.dropout=0.1"),
    *("data.source=stories", "data.n_documents=60", "data.tokenizer=char", "data.validation_fraction=0.2"),
    *("phases.dense.steps=12", "phases.moe.steps=10", "phases.large_moe.steps=8", "phases.moe.n_experts=4"),
    *("phases.large_moe.d_model=48", "phases.large_moe.n_layers=3", "training.eval_sequences=8"),
    *("training.batch_size=4", "training.log_every=1", "training.eval_every=3", "training.checkpoint_every=5"),
]


class Interrupting(Console):
    """Raises a signal when a step of a phase is done."""

    def __init__(self, moment):
        super().__init__(quiet=True)
        self.moment = moment

    @contextlib.contextmanager
    def progress(self, title, n_steps, done):
        def advance(step, row):
            if (int(title[len("Phase ")]), step) == self.moment:
                signal.raise_signal(self.number)

        yield advance

    @property
    def number(self):
        return (signal.SIGINT, signal.SIGTERM)[sum(self.moment) % 2]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_twenty_interruptions_change_nothing(backend, accumulation_steps, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    run = load_run("demo", None, [*SIZE, f"engine.accumulation_steps={accumulation_steps}"])
    chosen, options = choose_backend(backend), Options("cpu")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(run, whole, chosen, 3, options, Console(quiet=True))

    moments = sorted(random.Random(accumulation_steps).sample(MOMENTS, 20 if accumulation_steps == 1 else 5))
    for n, moment in enumerate(moments):
        console = Interrupting(moment)
        with pytest.raises(TrainingStopped) as caught:
            train(run if n == 0 else open_run(pieces), pieces, chosen, 3, options, console)
        assert caught.value.exit_code == 128 + console.number
        last = checkpoint.load(pieces).state
        assert (last.phase, last.step) == moment
    train(open_run(pieces), pieces, chosen, 3, options, Console(quiet=True))

    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(log.read(pieces / name)) == untimed(log.read(whole / name))
    assert (pieces / "samples.md").read_text() == (whole / "samples.md").read_text()
    for phase, n in STEPS.items():
        one, other = (checkpoint.load(checkpoint.folder(run, phase, n)) for run in (whole, pieces))
        assert one.state == other.state
        for arrays in ("weights", "optimizer_state"):
            for name, array in getattr(one, arrays).items():
                assert array.tobytes() == getattr(other, arrays)[name].tobytes(), (phase, name)
    assert checkpoint.load(pieces / "best").state == checkpoint.load(whole / "best").state


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
