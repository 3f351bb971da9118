"""What `plot` draws of a sweep and its fits, whatever numbers and names stand there, and what it refuses."""

import copy
import json
import shutil
import warnings

import matplotlib as mpl
import pytest

from mlx_moe.analysis.plots import STYLE
from mlx_moe.analysis.scaling import Point, fit
from mlx_moe.analysis.scaling_plot import read_fits, scaling
from mlx_moe.analysis.sweep_plot import choices
from mlx_moe.errors import InputError
from mlx_moe.storage import jsonl

ODD = [None, True, "1", float("nan"), float("inf"), -1e308, 1e308, 10**400, [], {}, "$\\frac$"]


@pytest.fixture(scope="module")
def fits():
    """What `mlxmoe fit` writes, with few draws."""
    points = [Point(n, d, 1 + n**-0.3 + d**-0.2, f"{n},{d}") for n in (1e3, 1e4, 1e5) for d in (1e4, 1e5, 1e6)]
    return {"parameters": "total", "fits": [fit(points, "ND", resamples=3).to_json()]}


def leaves(values, path=()):
    """The path of every value that is no mapping or list, and of every mapping and list."""
    yield path
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, (*path, key))


def draw(figure, folder):
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure().savefig(folder / "figure.png", dpi=40)


def odd_fits(fits):
    """The fits with one value replaced by an odd one; of lists, in the first place only."""
    for path in list(leaves(fits))[1:]:
        if not set(path) & {"formula", "method", "generator", "predicted", *range(1, 9)}:
            for odd in ODD:
                values = copy.deepcopy(fits)
                place = values
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = odd
                yield values, f"{path} is {str(odd)[:20]}"


def test_every_odd_value_in_fits_is_drawn_or_named(fits, tmp_path):
    file, faults, n_refused = tmp_path / "fits.json", [], 0
    for values, what in odd_fits(fits):
        file.write_text(json.dumps(values))
        try:
            found = read_fits(file)[1]
        except InputError as error:
            n_refused += 1
            faults += [what] if f"cannot read fits from {file}: " not in str(error) or "\n" in str(error) else []
        else:
            for one in found:
                draw(lambda one=one: scaling(one, "total"), tmp_path)
    assert faults == []
    assert n_refused > 150


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", "[" * 9999, '{"parameters": "total", "fits": []}', "\0"])
def test_fits_that_are_none(text, mlxmoe, tmp_path):
    (tmp_path / "fits.json").write_text(text)
    result = mlxmoe("plot", tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["fits.json"]


@pytest.mark.parametrize(
    "losses", [[1e38, 1e38], [-1e38, 1e38], [1e30, 2.0], [2.0, 2.0], [0, 0], [5e-324, 5e-324], [1.0, 1.0 + 1e-16]]
)
def test_losses_of_any_size_are_drawn(losses, dense, tmp_path):
    for seed in (0, 1):
        shutil.copytree(dense, tmp_path / f"run{seed}")
        rows = [row for row in jsonl.read(dense / "metrics.jsonl") if "validation_loss" in row]
        rows = [row | {"validation_loss": loss} for row, loss in zip(rows[: len(losses)], losses, strict=True)]
        (tmp_path / f"run{seed}" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {f"run{seed}": {"choices": {"arm": "_a$b$_{", "seed": seed}} for seed in (0, 1)}
    (tmp_path / "sweep.json").write_text(json.dumps(runs))
    draw(lambda: choices(tmp_path), tmp_path)


def test_one_point_is_drawn(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"phase": 1, "step": 0, "validation_loss": 3.0}\n')
    (tmp_path / "sweep.json").write_text(json.dumps({"run": {"choices": {"seed": 0}}}))
    draw(lambda: choices(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"a": 3}, "a = 3"),
        ({"a": {}}, "a.choices"),
        ({"a": {"choices": []}}, "a.choices = []"),
        ([], "valid dictionary"),
        ({"../a": {"choices": {}}}, "the run's name '../a' begins with a dot"),
    ],
)
def test_a_sweep_that_is_none(values, said, mlxmoe, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(values))
    result = mlxmoe("plot", tmp_path)
    assert result.code == 2
    assert f"cannot read {tmp_path / 'sweep.json'}: " in result.err
    assert said in result.err
    assert result.err.count("\n") == 1
