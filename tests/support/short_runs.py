"""Runs of three phases that take a second, and comparisons of two runs."""

import contextlib

from mlx_moe.hub.models import open_model
from mlx_moe.presets import load_run
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.request import Options
from mlx_moe.training.run import train_phases

SIZE = [
    *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.context_length=16", "model.dropout=0.1"),
    *("data.source=stories", "data.n_documents=60", "data.tokenizer=char", "data.validation_fraction=0.2"),
    *("phases.moe.n_experts=4", "phases.large_moe.d_model=48", "phases.large_moe.n_layers=3"),
    *("training.batch_size=4", "training.log_every=1", "training.eval_every=3", "training.checkpoint_every=5"),
    *("training.eval_sequences=8",),
]
PHASES = {1: "1-dense", 2: "2-moe", 3: "3-large-moe"}
STEPS = {1: 12, 2: 10, 3: 8}
LENGTHS = [f"phases.{name}.steps={STEPS[phase]}" for phase, name in enumerate(("dense", "moe", "large_moe"), start=1)]
TIMING = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu", "seconds"}


def short_run(*overrides):
    return load_run("demo", None, [*SIZE, *LENGTHS, *overrides])


def start(run, directory, backend="torch", console=None, n_phases=3):
    options = Options("cpu", open_model=open_model)
    train_phases(run, directory, choose_backend(backend), n_phases, options, console or Console(quiet=True))


class AfterStep(Console):
    """Console that calls a function after one step of a phase."""

    def __init__(self, moment, act):
        super().__init__(quiet=True)
        self.moment, self.act = moment, act

    @contextlib.contextmanager
    def progress(self, title, n_steps, done):
        def advance(step, row):
            if (int(title[len("Phase ")]), step) == self.moment:
                self.act()

        yield advance


def checkpoint_folder(run, phase, step):
    """Return the path of a checkpoint of a run with the usual three phases."""
    return checkpoint.folder(run, PHASES[phase], step)


def assert_same_run(one, other):
    """Assert that rows, samples, and weights at the end of each phase are equal to the last bit; times may differ."""
    for name in ("metrics.jsonl", "history.jsonl"):
        assert _untimed(jsonl.read(one / name)) == _untimed(jsonl.read(other / name))
    assert (one / "samples.md").read_text() == (other / "samples.md").read_text()
    phases = [folder.name for folder in checkpoint.phase_folders(one)]
    assert phases == [folder.name for folder in checkpoint.phase_folders(other)]
    for phase in phases:
        first, second = (checkpoint.load(run / "phases" / phase) for run in (one, other))
        assert first.state == second.state
        for arrays in ("weights", "optimizer_state"):
            for name, array in getattr(first, arrays).items():
                assert array.tobytes() == getattr(second, arrays)[name].tobytes(), (phase, name)
    assert checkpoint.load(one / "best").state == checkpoint.load(other / "best").state


def _untimed(rows):
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
