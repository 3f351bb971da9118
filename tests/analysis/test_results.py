import csv
import json
import os
import shutil

import pytest

from mlx_moe.analysis.sweep_results import effects, read_points, row_of, write
from mlx_moe.analysis.sweeps import PlannedRun
from mlx_moe.config import RunConfig
from mlx_moe.errors import InputError


def row(arm, seed, loss, status="finished"):
    return {
        "run": f"{arm},seed={seed}",
        "status": status,
        "reason": None,
        "choices": {"arm": arm, "seed": seed},
        "seed": seed,
        "parameters_non_embedding": 100 + seed,
        "tokens": 1000,
        "validation_loss": loss,
    }


ROWS = [
    *(row("a", seed, loss) for seed, loss in enumerate((2.0, 3.0, 4.0))),
    *(row("b", seed, loss) for seed, loss in enumerate((1.9, 2.8, 3.7))),
    row("c", 0, 9.0, "failed"),
]


def test_differences_are_paired_by_seed():
    first, second = effects(ROWS)
    assert (first.choice, first.seeds, first.loss, first.difference) == ({"arm": "a"}, 3, 3.0, None)
    # Student's t at 0.975 with 2 degrees of freedom is 4.303; the standard deviations are 1 and 0.1.
    assert first.loss_interval == pytest.approx((3 - 4.303 / 3**0.5, 3 + 4.303 / 3**0.5), abs=1e-3)
    assert second.difference == pytest.approx(-0.2)
    assert second.difference_interval == pytest.approx((-0.2 - 0.4303 / 3**0.5, -0.2 + 0.4303 / 3**0.5), abs=1e-3)


def test_one_seed_has_no_interval():
    first, second = effects([ROWS[0], ROWS[3]])
    assert first.loss_interval is second.difference_interval is None
    assert second.difference == pytest.approx(-0.1)


def test_a_missing_first_choice_leaves_losses_only():
    (only,) = effects([row("a", 0, 1.0, "failed"), row("b", 0, 2.0)])
    assert (only.loss, only.difference) == (2.0, None)


def test_what_is_written_reads_back(tmp_path):
    write(ROWS, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ROWS
    table = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [line["arm"] for line in table] == ["a"] * 3 + ["b"] * 3 + ["c"]
    assert "choices" not in table[0]
    for path in (tmp_path, tmp_path / "results.jsonl"):
        points = read_points(path, "non_embedding")
        assert [(p.n, p.d, p.loss) for p in points[:2]] == [(100, 1000, 2.0), (101, 1000, 3.0)]
        assert len(points) == 6


def test_an_axis_that_is_called_as_a_figure_leaves_that_alone(tmp_path):
    write([ROWS[0] | {"choices": {"validation_loss": "q", "seed": 0}}], tmp_path)
    (line,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (line["validation_loss"], line["axis validation_loss"], line["seed"]) == ("2.0", "q", "0")


def test_results_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no results at"):
        read_points(tmp_path, "total")
    (tmp_path / "results.jsonl").write_text('{"status": "finished"}\n')
    with pytest.raises(InputError, match="cannot read"):
        read_points(tmp_path, "total")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": "3"}, "line 1: tokens = '3': input should be a valid integer"),
        ({"tokens": True}, "tokens = True"),
        ({"tokens": None}, "line 1: a finished run has parameters_total, tokens"),
        ({"validation_loss": float("nan")}, "validation_loss = nan: input should be a finite number"),
        ({"validation_loss": float("inf")}, "validation_loss = inf: input should be a finite number"),
        ({"validation_loss": [1]}, "validation_loss = [1]"),
        ({"parameters_total": -1}, "parameters_total = -1"),
        ({"status": "finishd"}, "status = 'finishd'"),
        ({"run": 7}, "run = 7"),
    ],
)
def test_a_row_that_is_none_is_named(change, said, tmp_path):
    values = {"run": "a", "status": "finished", "parameters_total": 10, "tokens": 10, "validation_loss": 1.0}
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(values | change))
    with pytest.raises(InputError) as error:
        read_points(file, "total")
    assert said in str(error.value)


@pytest.mark.parametrize("line", ["3", "[]", "{", "[" * 10_000, '{"a": ' + "1" * 5_000 + "}", '"\\ud800"', "\0"])
def test_a_line_that_is_no_row_is_named(line, mlxmoe, tmp_path):
    (tmp_path / "results.jsonl").write_text("\n" + line + "\n")
    result = mlxmoe("fit", tmp_path)
    assert result.code == 2
    assert f"{tmp_path / 'results.jsonl'}, line 2" in result.err
    assert result.err.count("\n") == 1


def test_losses_that_no_sum_holds_are_left_out():
    found = effects([row("a", 0, 1e308), row("a", 1, 1e308), row("b", 0, 2.0), row("b", 1, 3.0)])
    assert [(effect.choice, effect.loss, effect.difference) for effect in found] == [({"arm": "b"}, 2.5, None)]


RUN = PlannedRun("run", {}, 1, RunConfig())


@pytest.fixture
def run(dense, tmp_path):
    """A finished run of one phase, with a `failure.json` that a sweep wrote an hour before."""
    folder = tmp_path / "run"
    shutil.copytree(dense, folder)
    fail(folder, "it exploded")
    seconds = (folder / "history.jsonl").stat().st_mtime
    os.utime(folder / "failure.json", (seconds - 3600, seconds - 3600))
    return folder


def fail(folder, reason):
    (folder / "failure.json").write_text(json.dumps({"reason": reason, "exit_code": 1}))


def test_a_run_that_was_resumed_and_finished_is_finished(run):
    assert row_of(RUN, run)["status"] == "finished"
    fail(run, "later than all that the run wrote")
    assert row_of(RUN, run)["status"] == "finished"


def test_a_failure_is_believed_until_the_run_goes_on(run):
    (run / "history.jsonl").write_text("")
    assert row_of(RUN, run)["status"] == "interrupted"
    fail(run, "it exploded")
    row = row_of(RUN, run)
    assert (row["status"], row["reason"]) == ("failed", "it exploded")
    (run / "config.yaml").touch()  # as the beginning of a resumed run does
    assert row_of(RUN, run)["status"] == "interrupted"


def test_a_run_that_never_began_can_have_failed(tmp_path):
    assert row_of(RUN, tmp_path)["status"] == "not begun"
    fail(tmp_path, "no text")
    assert row_of(RUN, tmp_path)["status"] == "failed"


@pytest.mark.parametrize(
    "text", ["{}", "[]", "", "{", '{"reason": 3, "exit_code": 1}', '{"reason": "x", "exit_code": "1"}']
)
def test_a_failure_that_cannot_be_read_is_one(text, tmp_path):
    (tmp_path / "failure.json").write_text(text)
    row = row_of(RUN, tmp_path)
    assert row["status"] == "failed"
    assert f"cannot read {tmp_path / 'failure.json'}" in row["reason"] or "is not valid JSON" in row["reason"]
