"""Whatever place a command is given for its output, nothing that was there before is gone or changed after."""

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from commands import COMMANDS, WRITING
from materials import copy
from trees import added, leftovers, lost, snapshot

DEFAULT_NAMES = ("report.html", "experts.json", "parity.json", "parity.html", "fits.json", "DATA.md", "loss.svg")
PLACES = {
    "a file": "foreign.txt",
    "a file of another's, with a slash": "foreign.txt/",
    "a file whose name has a line feed": "two\nlines.txt",
    "an empty folder": "empty",
    "a full folder": "full",
    "a folder with files of these names": "named",
    "a folder with folders of these names": "folders",
    "a link to a file": "link-to-file",
    "a link to a folder": "link-to-folder",
    "a link to an empty folder": "link-to-empty",
    "a dangling link": "dangling",
    "a link into nowhere": "into-nowhere",
    "a link to itself": "circle",
    "the run itself": "run",
    "a phase of the run": "run/phases/1-dense",
    "a checkpoint of the run": "run/phases/1-dense/checkpoints/step-2",
    "a file of the run": "run/config.yaml",
    "metrics of the run": "run/metrics.jsonl",
    "the run's parent": "../sandbox",
    "the parent's parent": "..",
    "the model": "model",
    "the sweep": "sweep/seed=0",
    "the working folder": ".",
    "no name": "",
    "the temporary folder": "tmp",
    "a FIFO": "fifo",
    "a socket": "socket",
    "/dev/null": "/dev/null",
    "a link to /dev/null": "link-to-null",
    "below a file": "foreign.txt/below",
    "below a FIFO": "fifo/below",
    "a long name": "x" * 300,
    "a long path": "/".join(["y" * 200] * 30),
    "a long name with an umlaut": "ü" * 130,
    "no such user": "~nobody-such/x",
    "a byte that is no character": "odd\udcff",
}
# Others stand for these where a command takes long.
ALIKE = (
    *("no name", "the parent's parent", "a phase of the run", "a checkpoint of the run", "a link to an empty folder"),
    *("the model", "the sweep"),
)
THOROUGH = "MLXMOE_FAULTS_ROUNDS" in os.environ


def furnish(sandbox):
    """Put what the places name beside the materials."""
    for folder in ("empty", "empty-too", "full/inner", "named", *(f"folders/{name}/inner" for name in DEFAULT_NAMES)):
        (sandbox / folder).mkdir(parents=True)
    for file in ("foreign.txt", "two\nlines.txt", "full/thesis.txt", "full/inner/thesis.txt", ".hidden"):
        (sandbox / file).write_text("years of work\n")
    for name in DEFAULT_NAMES:
        (sandbox / "named" / name).write_text("years of work\n")
    targets = {"file": "foreign.txt", "folder": "full", "empty": "empty-too", "null": "/dev/null"}
    for name, target in targets.items():
        (sandbox / f"link-to-{name}").symlink_to(target)
    (sandbox / "dangling").symlink_to("not-yet")
    (sandbox / "into-nowhere").symlink_to("not/yet/there")
    (sandbox / "circle").symlink_to("circle")
    os.mkfifo(sandbox / "fifo")
    kernels = Path(tempfile.gettempdir()) / "mlx"  # which MLX compiles: half a minute of work
    kernels.mkdir(exist_ok=True)
    (sandbox / "tmp" / "mlx").symlink_to(kernels)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener, contextlib.chdir(sandbox):
        listener.bind("socket")


@pytest.fixture
def furnished(sandbox):
    furnish(sandbox)
    return sandbox


def is_below(path, place):
    return path == place or place in path.parents


def assert_nothing_lost(outcome, before, sandbox, place=None):
    """`place`: the only one where something may have come into being, if the command succeeded."""
    after = snapshot(sandbox.parent)
    assert outcome.code in (0, 2), outcome
    assert outcome.refusal is None
    assert lost(before, after) == []
    new = [sandbox.parent / name for name in added(before, after)]
    if outcome.code == 2 or place is None:
        assert new == []
    lexical = Path(os.path.abspath(sandbox / place)) if place is not None else sandbox
    assert [path for path in new if not is_below(path, lexical) and not is_below(path, lexical.resolve())] == []
    assert leftovers(sandbox.parent) == []


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param(command, place, id=f"{command}-{place.replace(' ', '-')}")
        for command in WRITING
        for place in PLACES
        if THOROUGH or not command.is_slow or place not in ALIKE
    ],
)
def test_nothing_is_lost(command, place, run, furnished):
    before = snapshot(furnished.parent)
    outcome = run(furnished, command.argv(PLACES[place]), TMPDIR=str(furnished / "tmp"))
    assert_nothing_lost(outcome, before, furnished, PLACES[place])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.default], ids=str)
def test_its_own_place_is_taken_by_a_folder(command, run, furnished):
    for name in command.default:
        (furnished / name / "inner").mkdir(parents=True)
        (furnished / name / "inner" / "thesis.txt").write_text("years of work\n")
    before = snapshot(furnished.parent)
    assert_nothing_lost(run(furnished, command.argv()), before, furnished, ".")


@pytest.mark.parametrize("command", WRITING, ids=str)
def test_a_folder_that_may_not_be_written(command, run, built, as_nobody):
    with tempfile.TemporaryDirectory() as base:
        sandbox = copy(built / "materials", Path(base) / "sandbox")
        shutil.copytree(built / "cache", Path(base) / "cache")
        (sandbox / "locked").mkdir()
        (sandbox / "locked" / "thesis.txt").write_text("years of work\n")
        for path in [Path(base), *Path(base).rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = snapshot(sandbox.parent)
        with as_nobody():
            outcomes = [
                run(sandbox, command.argv(place), MLXMOE_CACHE=str(Path(base) / "cache"))
                for place in ("locked", "locked/new", "locked/new/newer")
            ]
        for outcome in outcomes:
            assert outcome.code == 2, outcome
            assert_nothing_lost(outcome, before, sandbox)


@pytest.mark.parametrize("command", [row for row in COMMANDS if row.default and row.name != "eval"], ids=str)
def test_a_foreign_file_at_the_default_place_stays(command, run, sandbox):
    place = sandbox / command.default[0]
    if command.name == "plot":
        place = place / "loss.svg"
    place.parent.mkdir(exist_ok=True)
    place.write_text("years of work, of which a note was written by mlxmoe\n")
    before = snapshot(sandbox)
    outcome = run(sandbox, command.argv())
    assert (outcome.code, outcome.refusal) == (2, None), outcome
    assert "was not written by this command" in outcome.err
    assert lost(before, snapshot(sandbox)) == []
