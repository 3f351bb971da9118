"""Materials for all tests of a session, shared between its processes."""

import fcntl
import os

import pytest
from materials import build, copy
from running import run_here


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with the materials and their token cache."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "faults"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            build(folder / "materials", folder / "cache")
            (folder / "complete").touch()
    return folder


@pytest.fixture
def sandbox(built, tmp_path):
    """A copy of the materials, to run a command in."""
    return copy(built / "materials", tmp_path / "sandbox")


@pytest.fixture(scope="session")
def run(built):
    """Runs `mlxmoe ARGV` in a folder, in this process."""

    def mlxmoe(folder, argv, **environment):
        return run_here(argv, folder, {"MLXMOE_CACHE": str(built / "cache"), **environment})

    return mlxmoe
