"""Two commands at once: in one place one of them wins whole and the other says so; in two places neither minds.

MLXMOE_FAULTS_ROUNDS: how often each is tried. Without it those that take long are tried once, the others twice.
"""

import os
import shutil
from pathlib import Path

import pytest
from commands import COMMANDS, WRITING
from materials import copy
from racing import run_at_once
from trees import differences, leftovers, lost, snapshot

ROUNDS = os.environ.get("MLXMOE_FAULTS_ROUNDS")
PLACE, OTHER_PLACE = "together/out", "together/other"
BY_DEFAULT = [command for command in COMMANDS if command.default]
BY_NAME = {str(command): command for command in COMMANDS}


def rounds(command):
    return range(int(ROUNDS) if ROUNDS else 1 if command.is_slow else 2)


class Arena:
    """One folder, to which the materials are copied anew for every round, since outputs may name it."""

    def __init__(self, built, folder):
        self.built, self.folder = built, folder
        self.environment = {"MLXMOE_CACHE": str(built / "cache")}
        self.alone = {}

    def run(self, *calls):
        """The outcomes, and what stood in the folder before."""
        sandbox = copy(self.built / "materials", self.folder / "sandbox")
        before = snapshot(sandbox)
        return run_at_once(calls, sandbox, self.environment), before

    def place(self, name):
        return self.folder / "sandbox" / name

    def undisturbed(self, command, place=None):
        """Where the outputs of a command that runs alone are kept, by name."""
        if (command, place) not in self.alone:
            (outcome,), _ = self.run(command.argv(place))
            assert outcome.code == 0, outcome
            kept = self.alone[command, place] = {}
            for number, name in enumerate(command.default if place is None else (place,)):
                folder = self.folder / "alone" / f"{command}-{number}-{place is None}"
                folder.mkdir(parents=True)
                kept[name] = folder / Path(name).name
                shutil.move(self.place(name), kept[name])
        return self.alone[command, place]


@pytest.fixture(scope="module")
def arena(built, tmp_path_factory):
    return Arena(built, tmp_path_factory.mktemp("arena"))


def assert_won_whole(arena, command, place, outcomes, before):
    assert {outcome.code for outcome in outcomes} <= {0, 2}, outcomes
    assert [outcome.refusal for outcome in outcomes] == [None, None]
    winners = [outcome.code for outcome in outcomes].count(0)
    assert winners == 1 if command.output == "folder" and not command.goes_on else winners >= 1, outcomes
    for name, whole in arena.undisturbed(command, place).items():
        assert differences(arena.place(name), whole) == [], (name, outcomes)


@pytest.mark.parametrize(
    ("command", "place"),
    [pytest.param(command, PLACE, id=f"{command}-named") for command in WRITING]
    + [pytest.param(command, None, id=f"{command}-default") for command in BY_DEFAULT],
)
def test_in_one_place(command, place, arena):
    arena.undisturbed(command, place)
    for _ in rounds(command):
        outcomes, before = arena.run(command.argv(place), command.argv(place))
        assert_won_whole(arena, command, place, outcomes, before)
        after = snapshot(arena.place("."))
        assert lost(before, after) == []
        assert leftovers(arena.place(".")) == []


@pytest.mark.parametrize("command", WRITING, ids=str)
def test_in_two_places_of_one_folder(command, arena):
    (whole,) = arena.undisturbed(command, PLACE).values()
    for _ in rounds(command):
        outcomes, before = arena.run(command.argv(PLACE), command.argv(OTHER_PLACE))
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
        for place in (PLACE, OTHER_PLACE):
            assert differences(arena.place(place), whole) == []
        assert lost(before, snapshot(arena.place("."))) == []
        assert leftovers(arena.place(".")) == []


@pytest.mark.parametrize(("one", "other"), [("upcycle", "export"), ("import", "grow")])
def test_two_commands_in_one_place(one, other, arena):
    commands = [BY_NAME[one], BY_NAME[other]]
    for command in commands:
        arena.undisturbed(command, PLACE)
    for _ in rounds(commands[0]):
        outcomes, before = arena.run(*(command.argv(PLACE) for command in commands))
        assert sorted(outcome.code for outcome in outcomes) == [0, 2], outcomes
        assert [outcome.refusal for outcome in outcomes] == [None, None]
        winner = commands[[outcome.code for outcome in outcomes].index(0)]
        assert differences(arena.place(PLACE), arena.undisturbed(winner, PLACE)[PLACE]) == []
        assert lost(before, snapshot(arena.place("."))) == []
        assert leftovers(arena.place(".")) == []
