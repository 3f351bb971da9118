"""A signal at every stage of a run, and going on afterwards as if it had not come."""

import signal

import pytest
from support.short_runs import AfterStep, assert_same_run, short_run, start

from mlx_moe.storage import checkpoint, jsonl
from mlx_moe.training import loop, phase_summary
from mlx_moe.training import run as training_run
from mlx_moe.training.console import Console
from mlx_moe.training.run import open_run
from mlx_moe.training.stopping import TrainingStopped, interruptions, stopping_at_once


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two phases that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXMOE_CACHE", str(directory / "cache"))
        start(short_run(), directory / "run", n_phases=2)
    return directory / "run"


# Where the signal comes, how often that place was passed before, and what the message says.
PLACES = {
    "the first evaluation": (loop, "evaluate", 0, "before step 1 of phase 1"),
    "an evaluation": (loop, "evaluate", 2, "after step 6 of phase 1 and saved"),
    "writing a row": (jsonl, "append", 2, "after step 2 of phase 1 and saved"),
    "saving": (checkpoint, "save", 1, "after step 5 of phase 1 and saved"),
    "the check of a boundary": (training_run, "certify", 0, "before step 1 of phase 2"),
    "the birth of a phase": (checkpoint, "save", 6, "before step 1 of phase 2"),
    "sampling": (phase_summary, "generate_text", 1, "after phase 1, which is saved"),
    "the last sampling": (phase_summary, "generate_text", 4, "after phase 2, which is saved"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_the_run_well(place, whole, tmp_path, monkeypatch):
    module, name, earlier, said = PLACES[place]
    function, calls = getattr(module, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == earlier + 1:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setenv("MLXMOE_CACHE", str(whole.parent / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(TrainingStopped) as caught:
            start(short_run(), tmp_path / "run", n_phases=2)
    assert caught.value.exit_code == 143
    assert f"SIGTERM: stopped {said}" in str(caught.value)
    assert f"mlxmoe train --resume {tmp_path / 'run'}" in str(caught.value)
    start(open_run(tmp_path / "run"), tmp_path / "run", n_phases=2)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_are_prepared_ends_the_run_at_once(number, tmp_path, monkeypatch):
    class Interrupted(Console):
        def line(self, text=""):
            assert text.startswith("reading")
            signal.raise_signal(number)

    monkeypatch.setenv("MLXMOE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TrainingStopped) as caught:
        start(short_run(), tmp_path / "run", console=Interrupted(quiet=True))
    assert caught.value.exit_code == 128 + number
    assert f"{number.name}: stopped before training began" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_signal_while_saving_ends_at_once_and_loses_only_that(whole, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return save(*arguments, **options)

    save = checkpoint.save
    run = short_run("training.checkpoint_every=7", "training.eval_every=100")
    console = AfterStep((1, 6), lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setenv("MLXMOE_CACHE", str(whole.parent / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(run, tmp_path / "run", console=console)
    assert checkpoint.latest(tmp_path / "run") is None
    start(open_run(tmp_path / "run"), tmp_path / "run", n_phases=1)
    first, second = (jsonl.read(run / "metrics.jsonl") for run in (tmp_path / "run", whole))
    assert [row["loss"] for row in first[1:]] == [row["loss"] for row in second[1:13]]


@pytest.mark.parametrize("handling", [interruptions, stopping_at_once])
def test_handlers_are_put_back(handling):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with handling():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_a_background_job_too():
    """Which a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptions() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
