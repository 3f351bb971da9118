"""The table of commands is complete, and what stands in it works."""

import shutil

import pytest
import typer
from commands import COMMANDS, DENSE, EXPERTS

import cli

MATERIALS = {"run", "model", "sweep.yaml", "sweep/seed=0", "scaling", DENSE, EXPERTS}


def registered(group, prefix=""):
    """The names of all commands, those in groups as `group command`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from registered(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_in_the_table():
    assert {command.name for command in COMMANDS} == set(registered(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_option_that_names_an_output_is_in_the_table(command):
    group = typer.main.get_command(cli.app)
    for word in command.name.split():
        group = group.commands[word]
    named = {
        None if option.param_type_name == "argument" else option.opts[0]
        for option in group.params
        if option.name in ("out", "html")
    }
    assert named == {row.option for row in COMMANDS if row.name == command.name and row.output}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_row_works(command, run, sandbox):
    outcome = run(sandbox, command.argv("out" if command.output else None))
    assert outcome.code == 0, outcome
    assert outcome.crash is None
    assert (sandbox / "out").is_file() == (command.output == "file")
    assert (sandbox / "out").is_dir() == (command.output in ("folder", "files"))


READING = [command for command in COMMANDS if set(command.arguments) & MATERIALS]


@pytest.mark.parametrize("state", ["missing", "damaged"])
@pytest.mark.parametrize("command", READING, ids=str)
def test_a_name_with_a_line_end_is_said_in_one_line(command, state, run, sandbox):
    inputs = sandbox / "two\nlines"
    if state == "damaged":
        shutil.copytree(sandbox, inputs)
        for file in inputs.rglob("*"):
            if file.is_file() and file.suffix in (".json", ".yaml", ".jsonl"):
                file.write_bytes(file.read_bytes()[:-3] + b"\0{")
    argv = [
        f"{inputs}/{word}" if word in MATERIALS else word for word in command.argv("out" if command.output else None)
    ]
    outcome = run(sandbox, argv)
    assert (outcome.code, outcome.refusal) == (2, None), outcome
    assert "two\\nlines" in outcome.err
