import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from mlx_moe.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    TrainPhaseConfig,
)
from mlx_moe.data.tokens import prepare
from mlx_moe.parameters import initialize
from mlx_moe.phases import get_phase
from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.storage.run_folder import RunFolder
from mlx_moe.training.backend import Backend, choose_backend
from mlx_moe.training.console import Console
from mlx_moe.training.loop import Session, evaluate, load_imbalance, train_phase
from mlx_moe.training.phase_summary import phase_result
from mlx_moe.training.stopping import TrainingStopped, interruptions

CONTEXT, BATCH = 16, 8
ROW = {"phase", "step", "loss", "cross_entropy", "auxiliary_loss", "learning_rate", "grad_norm", "tokens"}
ROW |= {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = DataConfig(source="stories", n_documents=40, tokenizer="char", validation_fraction=0.2)
    return prepare(config, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["mlx", "torch"])
def backend(request):
    return request.param


@pytest.fixture
def make_run(data):
    def make(steps, *, moe=None, dropout=0.0, learning_rate=1e-2, **training):
        size = {"context_length": CONTEXT, "d_model": 16, "n_layers": 1, "n_heads": 2}
        model = ModelConfig(vocab_size=data.tokenizer.vocab_size, dropout=dropout, moe=moe, **size)
        phase = TrainPhaseConfig(steps=steps, learning_rate=learning_rate)
        often = {"log_every": 5, "eval_every": 10, "eval_sequences": 12, "checkpoint_every": 1000}
        every = TrainingConfig(**({"batch_size": BATCH} | often | training))
        return RunConfig(model=model, phases={"dense": phase}, training=every)

    return make


def build(backend, run, weights=None):
    weights = initialize(run.model, 0) if weights is None else weights
    return choose_backend(backend).trainer(run.model, weights, OptimizerConfig(), "cpu")


@pytest.fixture
def train(data, backend):
    def train(run, directory, trainer=None, step=0):
        directory.mkdir(exist_ok=True)
        trainer = trainer or build(backend, run)
        phase, console = get_phase(run, 1), Console(quiet=True)
        with interruptions() as interruption:
            session = Session(run, data, Backend(backend, ""), RunFolder(directory), console, interruption)
            train_phase(session, phase, trainer, step)
        return trainer

    return train


@pytest.fixture
def resume(train, backend):
    """Go on with the latest checkpoint, as phases do."""

    def resume(run, directory):
        loaded = checkpoint.load(directory)
        trainer = build(backend, run, loaded.weights)
        trainer.load_optimizer_state(loaded.optimizer_state)
        jsonl.truncate_after(directory / "metrics.jsonl", loaded.state.phase, loaded.state.step)
        return train(run, directory, trainer, loaded.state.step)

    return resume


def rows(directory):
    return jsonl.read(directory / "metrics.jsonl")


class Wrapped:
    """A trainer that does something else at one of its steps, counted from 1."""

    def __init__(self, inner, at, act=lambda: None, learning_rate=None):
        self._inner, self._at, self._act, self._learning_rate = inner, at, act, learning_rate
        self._steps = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def step(self, tokens_BT1, learning_rate, dropout_seed):
        self._steps += 1
        if self._steps == self._at:
            self._act()
            learning_rate = self._learning_rate or learning_rate
        return self._inner.step(tokens_BT1, learning_rate, dropout_seed)


def raise_signal(*numbers):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


# What is written down


def test_rows_come_at_the_promised_steps_with_the_promised_keys(make_run, train, tmp_path):
    train(make_run(12), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 5, 10, 12]
    first, *others = rows(tmp_path)
    assert first.keys() == {"phase", "step", "validation_loss"}
    for row in others:
        assert row.keys() == (ROW | {"validation_loss"} if row["step"] in (10, 12) else ROW)
        assert row["tokens"] == row["step"] * BATCH * CONTEXT
        assert row["loss"] == row["cross_entropy"]  # a dense model has no auxiliary terms
        assert row["grad_norm"] > 0
        assert row["tokens_per_s"] > 0
    assert others[0]["learning_rate"] == 1e-2
    assert others[-1]["learning_rate"] == pytest.approx(1e-3)


def test_a_fresh_model_knows_nothing(make_run, train, data, tmp_path):
    train(make_run(1), tmp_path)
    for row in rows(tmp_path):
        assert row.get("cross_entropy", row.get("validation_loss")) == pytest.approx(
            math.log(data.tokenizer.vocab_size), rel=0.05
        )


def test_router_entropy_is_in_the_row_where_a_trainer_gives_it(make_run, train, backend, tmp_path):
    class Entropic(Wrapped):
        def step(self, *arguments):
            pending = super().step(*arguments)
            return lambda: replace(pending(), router_entropy_L=np.array([0.25, 1.5], np.float32))

    run = make_run(1)
    train(run, tmp_path, Entropic(build(backend, run), 0))
    assert rows(tmp_path)[1]["router_entropy"] == [0.25, 1.5]


def test_experts_show_their_load(make_run, train, tmp_path):
    run = make_run(3, moe=MoEConfig(n_experts=4, top_k=2), log_every=1)
    train(run, tmp_path)
    for row in rows(tmp_path)[1:]:
        assert row["loss"] > row["cross_entropy"]
        assert row["auxiliary_loss"] == row["loss"] - row["cross_entropy"]
        assert np.shape(row["expert_load"]) == (1, 4)
        assert sum(row["expert_load"][0]) == pytest.approx(1, abs=1e-4)
        assert row["load_imbalance"] == pytest.approx(4 * max(row["expert_load"][0]), abs=1e-3)


def test_validation_loss_falls(make_run, train, tmp_path):
    train(make_run(60), tmp_path)
    losses = [row["validation_loss"] for row in rows(tmp_path) if "validation_loss" in row]
    assert len(losses) == 7
    assert losses[-1] < 0.75 * losses[0]
    result = phase_result(rows(tmp_path), 1, 60)
    assert (result.first_validation_loss, result.last_validation_loss) == (losses[0], losses[-1])
    assert result.last_loss < result.first_loss
    assert result.tokens == 60 * BATCH * CONTEXT
    assert result.seconds > 0


def test_checkpoints_come_at_their_steps_and_the_last_few_stay(make_run, train, tmp_path, backend):
    trainer = train(make_run(11, checkpoint_every=3, keep_checkpoints=2, eval_every=100), tmp_path)
    assert [path.name for path in checkpoint.complete_in(tmp_path)] == ["step-9", "step-11"]
    last = checkpoint.load(tmp_path)
    assert (last.state.phase, last.state.step, last.state.backend) == (1, 11, backend)
    assert last.state.validation_loss == rows(tmp_path)[-1]["validation_loss"]
    for name, array in trainer.weights().items():
        np.testing.assert_array_equal(last.weights[name], array)


def test_the_best_is_saved_where_it_is_found_and_stays(make_run, train, backend, tmp_path):
    run = make_run(20, eval_every=5, keep_checkpoints=1, checkpoint_every=1000)
    train(run, tmp_path, Wrapped(build(backend, run), 11, learning_rate=1.0))  # it gets worse from there
    losses = {row["step"]: row["validation_loss"] for row in rows(tmp_path) if "validation_loss" in row}
    assert min(losses, key=losses.get) == 10
    assert [path.name for path in checkpoint.complete_in(tmp_path)] == ["step-10", "step-20"]
    assert checkpoint.load(tmp_path / "best").state.validation_loss == losses[10]


def test_each_step_is_saved_once_and_only_for_a_reason(make_run, train, backend, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save

    def noting(path, *arguments):
        saved.append(int(path.name.removeprefix("step-")))
        save(path, *arguments)

    monkeypatch.setattr(checkpoint, "save", noting)
    run = make_run(20, eval_every=5, checkpoint_every=4)
    train(run, tmp_path, Wrapped(build(backend, run), 6, learning_rate=1.0))
    assert saved == [4, 5, 8, 12, 16, 20]


def test_the_device_is_waited_for_only_where_a_row_is_written(make_run, train, backend, tmp_path):
    class Counting(Wrapped):
        def step(self, *arguments):
            pending = super().step(*arguments)
            step = self._steps

            def fetch():
                fetched.append(step)
                return pending()

            return fetch

    fetched = []
    run = make_run(12, checkpoint_every=3)
    train(run, tmp_path, Counting(build(backend, run), 0))
    assert fetched == [row["step"] for row in rows(tmp_path)[1:]] == [1, 5, 10, 12]


# Resuming


@pytest.mark.parametrize(
    "model", [{}, {"dropout": 0.2}, {"moe": MoEConfig(n_experts=4)}], ids=["dense", "dropout", "experts"]
)
def test_resumed_from_the_middle_a_run_ends_the_same_to_the_last_bit(make_run, train, resume, backend, tmp_path, model):
    run = make_run(10, log_every=1, **model)
    train(run, tmp_path / "whole")
    broken = Wrapped(build(backend, run), 4, raise_signal(signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(run, tmp_path / "pieces", broken)
    resume(run, tmp_path / "pieces")

    timing = {"tokens_per_s", "step_ms", "peak_memory_bytes", "mfu"}
    one, other = (
        [{key: value for key, value in row.items() if key not in timing} for row in rows(tmp_path / name)]
        for name in ("whole", "pieces")
    )
    assert one == other
    one, other = (checkpoint.load(tmp_path / name) for name in ("whole", "pieces"))
    for arrays in ("weights", "optimizer_state"):
        for name, array in getattr(one, arrays).items():
            assert array.tobytes() == getattr(other, arrays)[name].tobytes(), name


def test_a_phase_that_starts_over_leaves_no_row_of_its_earlier_try(make_run, train, tmp_path):
    run = make_run(6)
    jsonl.append(tmp_path / "metrics.jsonl", {"phase": 1, "step": 0, "validation_loss": 9.0})
    jsonl.append(tmp_path / "metrics.jsonl", {"phase": 1, "step": 5, "loss": 9.0})
    train(run, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 5, 6]
    assert phase_result(rows(tmp_path), 1, 6).first_validation_loss < 9


# Stopping


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_saves_and_says_how_to_go_on(make_run, train, backend, tmp_path, number, exit_code):
    run = make_run(50)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped) as caught:
        train(run, tmp_path, Wrapped(build(backend, run), 3, raise_signal(number)))
    assert caught.value.exit_code == exit_code
    for text in (number.name, "after step 3 of phase 1 and saved", f"--resume {tmp_path}"):
        assert text in str(caught.value)
    assert checkpoint.load(tmp_path).state.step == 3  # the step was finished
    assert signal.getsignal(number) is before


def test_a_second_interruption_ends_at_once(make_run, train, backend, tmp_path):
    run, before = make_run(50), signal.getsignal(signal.SIGINT)
    twice = Wrapped(build(backend, run), 3, raise_signal(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path, twice)
    assert list(checkpoint.complete_in(tmp_path)) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interruption_in_the_last_step_is_not_lost(make_run, train, backend, tmp_path):
    run = make_run(3)
    with pytest.raises(TrainingStopped, match="stopped after step 3 of phase 1 and saved"):
        train(run, tmp_path, Wrapped(build(backend, run), 3, raise_signal(signal.SIGINT)))
    assert checkpoint.load(tmp_path).state.step == 3


def test_a_loss_that_is_not_finite_stops_the_run(make_run, train, tmp_path):
    run = make_run(50, learning_rate=1e9, log_every=1, checkpoint_every=1)
    with pytest.raises(TrainingStopped) as caught:
        train(run, tmp_path)
    assert caught.value.exit_code == 1
    last = list(checkpoint.complete_in(tmp_path))[-1].relative_to(tmp_path)
    for text in (f"the last checkpoint is {last}", "learning_rate 1e+09", "warmup_steps"):
        assert text in str(caught.value)
    assert all(math.isfinite(row.get("loss", 0)) for row in rows(tmp_path))
    diverged = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert (diverged["event"], diverged["phase"]) == ("diverged", 1)
    assert "became nan" in diverged["reason"] or "became inf" in diverged["reason"]


def test_a_weight_that_is_not_finite_stops_the_run(make_run, train, backend, tmp_path):
    run = make_run(50)
    weights = initialize(run.model, 0)
    weights["norm.weight"][0] = np.nan
    with pytest.raises(
        TrainingStopped,
        match="validation loss became nan at step 0 of phase 1; there is no checkpoint yet; the weights it begins with",
    ):
        train(run, tmp_path, build(backend, run, weights))


def test_weights_that_are_not_finite_are_never_saved(make_run, train, backend, tmp_path):
    # They break between two rows of the log, and a checkpoint comes before the next row.
    run = make_run(50, log_every=1000, eval_every=1000, checkpoint_every=4, keep_checkpoints=1)
    with pytest.raises(TrainingStopped, match=r"weights are no longer finite at step 8 .*/step-4;"):
        train(run, tmp_path, Wrapped(build(backend, run), 6, learning_rate=1e38))
    assert [path.name for path in checkpoint.complete_in(tmp_path)] == ["step-4"]
    assert np.isfinite(checkpoint.load(tmp_path).weights["norm.weight"]).all()


# The small pieces


def test_evaluation_weighs_a_short_last_batch_by_its_size():
    class Lengths:
        def loss(self, windows_NT1):
            return float(windows_NT1.mean())

    windows_NT1 = np.arange(5).repeat(3).reshape(5, 3)
    assert evaluate(Lengths(), windows_NT1, 2) == pytest.approx(2)


def test_imbalance_is_that_of_the_worst_layer():
    assert load_imbalance(np.full((2, 4), 0.25, np.float32)) == 1
    assert load_imbalance(np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])) == pytest.approx(2.8)
