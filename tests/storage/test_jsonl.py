import json

import pytest

from mlx_moe.storage.jsonl import append, read, truncate_after
from mlx_moe.training.environment import library_versions


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_come_back_as_they_went_in(path):
    rows = [{"phase": 1, "step": 0, "loss": 0.1}, {"phase": 1, "step": 1, "text": 'a line\nand "more" \u2028 ü'}]
    for row in rows:
        append(path, row)
    assert read(path) == rows
    assert path.read_bytes().count(b"\n") == 2


def test_every_row_is_there_when_append_returns(path):
    append(path, {"step": 1})
    assert json.loads(path.read_text()) == {"step": 1}


def test_no_file_holds_no_rows(path):
    assert read(path) == []
    truncate_after(path, 1, 0)
    assert not path.exists()


@pytest.mark.parametrize("keep", range(1, len('{"step": 2}')))
def test_a_last_line_that_was_cut_off_is_left_out(path, keep):
    append(path, {"step": 1})
    with path.open("a") as stream:
        stream.write('{"step": 2}'[:keep])
    assert read(path) == [{"step": 1}]


def test_truncating_drops_what_came_after(path):
    rows = [{"phase": phase, "step": step} for phase in (1, 2, 3) for step in (0, 5, 10)]
    for row in rows:
        append(path, row)
    truncate_after(path, 2, 5)
    assert read(path) == rows[:5]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_boundary_belongs_to_the_birth_of_its_phase(path):
    append(path, {"event": "phase", "phase": 1, "step": 10})
    append(path, {"event": "boundary", "phase": 2})
    truncate_after(path, 2, 0)
    assert len(read(path)) == 2
    truncate_after(path, 1, 10)
    assert [row["event"] for row in read(path)] == ["phase"]


def test_after_a_rewind_a_cut_off_line_is_gone(path):
    append(path, {"phase": 1, "step": 1})
    with path.open("a") as stream:
        stream.write('{"phase": 1, "st')
    truncate_after(path, 1, 1)
    append(path, {"phase": 1, "step": 2})
    assert [row["step"] for row in read(path)] == [1, 2]


def test_versions_of_what_is_missing_are_none(monkeypatch):
    monkeypatch.setattr("mlx_moe.training.environment.LIBRARIES", ("numpy", "no-such-library"))
    versions = library_versions()
    assert versions["numpy"]
    assert versions["no-such-library"] is None
