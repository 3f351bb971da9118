"""What docs/guides/resuming.md says holds for a run: its command, its files, the lines that it quotes."""

import os
import re
import shlex
from pathlib import Path

import pytest
from support.short_runs import SIZE

from mlx_moe.storage import locks

DOCUMENT = (Path(__file__).parents[2] / "docs" / "guides" / "resuming.md").read_text(encoding="utf-8")


@pytest.fixture
def mine(mlxmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "demo", "--steps", 4, "--backend", "torch", *(f"-o{override}" for override in SIZE)]
    assert mlxmoe(*words, "--phases", 2, "--out", "runs/mine").code == 0
    return tmp_path / "runs" / "mine"


def test_the_command_and_the_files(mine, mlxmoe):
    (command,) = re.findall(r"```sh\n(.*?)\n```", DOCUMENT, flags=re.DOTALL)
    assert mlxmoe(*shlex.split(command)[1:]).code == 0
    table = re.search(r"\| file \|.*?\n\n", DOCUMENT, flags=re.DOTALL)[0].strip()
    patterns = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(patterns) == 7
    assert [pattern for pattern in patterns if not list(mine.glob(pattern.rstrip("/")))] == []


def test_the_line_that_refuses_a_second_process(mine, mlxmoe):
    lock = locks.acquire(mine)
    try:
        result = mlxmoe("train", "--resume", "runs/mine")
    finally:
        os.close(lock)
    assert result.code == 2
    assert result.err.replace("runs/mine", "runs/a") in DOCUMENT
