import csv
import json

import pytest

from mlx_moe.analysis.results import effects, read_points, write
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


def test_results_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no results at"):
        read_points(tmp_path, "total")
    (tmp_path / "results.jsonl").write_text('{"status": "finished"}\n')
    with pytest.raises(InputError, match="cannot read"):
        read_points(tmp_path, "total")
