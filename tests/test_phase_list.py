"""The phases of a run as a list: what a config may say, and what follows from it."""

import pytest

from mlx_moe.config import PhaseConfig, RunConfig
from mlx_moe.errors import InputError
from mlx_moe.phases import get_phase, get_phases, lineage, phase_model, start_phase
from mlx_moe.presets import load_run, preset_names
from mlx_moe.transfer.registry import TRANSFERS

SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2"]


def names(run):
    return list(run.phases)


def written(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_every_transfer_of_a_config_is_in_the_registry():
    kinds = {
        config.model_fields["transfer"].default
        for config in PhaseConfig.__subclasses__()
        if config.model_fields["transfer"].default
    }
    assert kinds == TRANSFERS.keys()


@pytest.mark.parametrize("preset", preset_names("runs"))
def test_every_preset_has_a_model_for_each_phase(preset):
    for phase in get_phases(load_run(preset)):
        assert phase.folder.startswith(f"{phase.number}-")
        assert phase.title.startswith(f"Phase {phase.number}: ")


def test_titles_say_what_the_model_is():
    assert [phase.title for phase in get_phases(load_run("three-phase"))] == [
        "Phase 1: dense",
        "Phase 2: mixture of experts",
        "Phase 3: larger mixture of experts",
    ]
    assert [phase.kind for phase in get_phases(load_run("grow-twice"))] == [
        "dense",
        "larger dense model",
        "larger dense model",
        "mixture of experts",
    ]
    scratch = load_run("three-phase", None, ["model.moe={n_experts: 4, top_k: 2}"])
    assert get_phase(scratch, 1).kind == "mixture of experts from scratch"


def test_a_file_that_names_a_transfer_lists_the_phases(tmp_path):
    file = written(tmp_path, "phases:\n  moe: {}\n  dense: {steps: 5}\n")
    assert names(load_run("three-phase", file)) == ["dense", "moe", "large_moe"]  # it changes settings only
    file = written(tmp_path, "phases:\n  dense: {}\n  wide: {transfer: grow}\n  moe: {transfer: upcycle, steps: 7}\n")
    run = load_run("three-phase", file)
    assert names(run) == ["dense", "wide", "moe"]
    assert run.phases["dense"].steps == 1000  # from the preset below
    assert (run.phases["moe"].steps, run.phases["moe"].n_experts) == (7, 8)


def test_a_phase_with_another_transfer_takes_no_setting_of_its_namesake(tmp_path):
    file = written(tmp_path, "phases:\n  dense: {}\n  moe: {transfer: grow, d_model: 1664}\n")
    assert load_run("three-phase", file).phases["moe"].transfer == "grow"


def test_phases_are_dropped_and_appended():
    assert names(load_run("three-phase", None, ["phases.large_moe=null"])) == ["dense", "moe"]
    run = load_run("demo", None, ["phases.again.transfer=grow", "phases.again.d_model=256"])
    assert names(run) == ["dense", "moe", "large_moe", "again"]
    assert phase_model(run, 4).d_model == 256


def test_steps_are_those_of_every_phase_but_for_overrides():
    run = load_run("three-phase", None, ["phases.moe.steps=3", "phases.again.transfer=grow"], steps=9)
    assert [phase.steps for phase in run.phases.values()] == [9, 3, 9, 9]


REFUSED = {
    "a misspelt phase": (["phases.mo.steps=3"], "no phase 'mo' in the run; did you mean 'moe'"),
    "an unknown transfer": (["phases.moe.transfer=shrink"], "transfer must be upcycle or grow"),
    "no transfer": (["phases.large_moe.transfer=null"], "phases.large_moe: only the first phase has no transfer"),
    "a size without a transfer": (
        ["phases.large_moe.transfer=null", "phases.large_moe.d_model=8"],
        "phases.large_moe: d_model belongs to a phase with transfer: grow",
    ),
    "nothing before it": (["phases.dense=null"], "phases.moe.transfer upcycle: the first phase has no model before it"),
    "none left": (["phases.dense=null", "phases.moe=null", "phases.large_moe=null"], "at least 1"),
    "a key of another transfer": (["phases.large_moe.n_experts=4"], "unknown key 'phases.large_moe.n_experts'"),
    "a name that is no folder": (["phases.a-b.transfer=grow"], "letters, digits and underscores"),
    "too many": ([f"phases.p{i}.transfer=grow" for i in range(32)], "must have at most 32 of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_list_of_phases_is_refused(case):
    overrides, said = REFUSED[case]
    with pytest.raises(InputError, match=said):
        load_run("three-phase", None, overrides)


def test_a_transfer_that_cannot_be_is_refused_with_its_phase():
    twice = load_run("demo", None, ["phases.again.transfer=upcycle"])
    with pytest.raises(InputError, match=r"phases\.again: the model has 8 experts by then, so there is nothing to"):
        get_phases(twice)
    with pytest.raises(InputError, match=r"phases\.large_moe: growth cannot shrink d_model"):
        get_phases(load_run("demo", None, ["phases.large_moe.d_model=64"]))


def started(first, last, has_experts, preset="demo"):
    run = load_run(preset)
    model = phase_model(run, 2) if has_experts else run.model
    values = run.model_dump() | {"start": {"model": "x", "phases": list(range(first, last + 1)), "lineage": ["x"]}}
    return RunConfig(**(values | {"model": model.model_dump()}))


@pytest.mark.parametrize(
    ("first", "last", "has_experts", "stands_at"),
    [(1, 1, False, 1), (2, 3, False, 1), (2, 2, True, 2), (3, 3, True, 2)],
)
def test_a_run_from_a_model_applies_a_transfer_where_it_can(first, last, has_experts, stands_at):
    run = started(first, last, has_experts)
    assert start_phase(run) == stands_at
    assert phase_model(run, stands_at) == run.model
    origin = lineage(run, last)
    assert len(origin) == 1 + sum(2 if number > first else 1 for number in range(stands_at + 1, last + 1))


def test_a_list_may_begin_with_a_transfer_of_a_model_from_outside():
    run = started(1, 1, has_experts=False)
    values = run.model_dump() | {"phases": {"moe": {"transfer": "upcycle"}, "large": {"transfer": "grow"}}}
    run = RunConfig(**values)
    assert start_phase(run) == 0
    assert get_phase(run, 1).model.moe is not None
