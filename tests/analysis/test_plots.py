import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from mlx_moe.analysis.plots import expert_load, loss
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.analysis.scaling import Point, fit
from mlx_moe.analysis.scaling_plot import read_fits, scaling
from mlx_moe.analysis.sweep_plot import choices
from mlx_moe.storage import jsonl

FIGURES = ["loss", "learning-rate", "gradient-norm", "tokens-per-s", "expert-load"]


@pytest.fixture(scope="module")
def figures(finished, mlxmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    result = mlxmoe("plot", finished, "--out", folder / "new")
    assert result.code == 0, result.err
    return folder / "new"


def test_every_figure_as_svg_and_png(figures):
    files = {path.name for path in figures.iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    for name in FIGURES:
        pixels = imread(figures / f"{name}.png")
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].std() > 0.02  # something is drawn


def test_the_same_run_gives_the_same_files(figures, finished, mlxmoe, tmp_path):
    assert mlxmoe("plot", finished, "--out", tmp_path).code == 0
    for file in figures.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_losses_are_those_of_the_run_and_boundaries_are_marked(finished):
    whole, *zooms = loss(read_record(finished)).axes
    rows = jsonl.read(finished / "metrics.jsonl")
    drawn = np.concatenate([line.get_ydata() for line in whole.lines[:6:2]])
    assert drawn.tolist() == [row["cross_entropy"] for row in rows if "loss" in row]
    drawn = np.concatenate([line.get_ydata() for line in whole.lines[1:6:2]])
    assert drawn.tolist() == [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert [text.get_text() for text in whole.texts] == ["1: dense", "2: experts", "3: larger experts"]
    marks = [line.get_xdata()[0] for line in whole.lines[6:]]
    assert marks == [12, 22]
    assert [sum(zoom.get_xlim()) / 2 for zoom in zooms] == marks
    jump = json.loads((finished / "boundaries" / "1-2.json").read_text())["loss_jump"]
    assert f"{jump:+.1e}"[:4] in zooms[0].get_title(loc="left")


def test_loads_over_the_fair_share(finished):
    record = read_record(finished)
    mesh = expert_load(record).axes[0].collections[0]
    expected = [row["expert_load"][0] for row in record.phases[1].rows if "expert_load" in row]
    assert np.array(mesh.get_array()) == pytest.approx(4 * np.array(expected).T)


def test_a_dense_run_has_no_expert_load(dense, mlxmoe):
    result = mlxmoe("plot", dense)
    assert result.code == 0, result.err
    files = {path.stem for path in (dense / "plots").iterdir()}
    assert files == set(FIGURES) - {"expert-load"}
    shutil.rmtree(dense / "plots")


def test_an_interrupted_run_is_drawn_as_far_as_it_went(interrupted):
    whole = loss(read_record(interrupted)).axes[0]
    assert whole.lines[2].get_xdata()[-1] == 12 + 5


def fitted(law, ns, ds):
    """A law of points near Chinchilla's curve."""
    pairs = [(n, d) for n in ns for d in ds]
    noise = 1 + 0.01 * np.sin(np.arange(len(pairs)))
    losses = np.array([1.69 + 406.4 / n**0.34 + 410.7 / d**0.28 for n, d in pairs]) * noise
    points = [Point(n, d, float(loss)) for (n, d), loss in zip(pairs, losses, strict=True)]
    return fit(points, law, resamples=20)


def test_scaling_laws_with_their_bands(mlxmoe, tmp_path):
    sizes = [1e6, 1e7, 1e8, 1e9]
    fits = [fitted("ND", sizes, [1e8, 1e9, 1e10]), fitted("N", [*sizes, 1e10], [1e9])]
    file = tmp_path / "fits.json"
    file.write_text(json.dumps({"parameters": "non_embedding", "fits": [one.to_json() for one in fits]}))
    assert read_fits(file) == ("non-embedding", fits)
    for place in (tmp_path, file):
        result = mlxmoe("plot", place)
        assert result.code == 0, result.err
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
            f"scaling-{law}.{kind}" for law in ("N", "ND") for kind in ("png", "svg")
        ]
    over_n, over_d = scaling(fits[0], "active").axes
    assert (len(over_n.collections), len(over_d.collections)) == (3, 4)  # a band for each D, and for each N
    line, points = over_n.lines[:2]
    assert points.get_ydata().tolist() == [point.loss for point in fits[0].points if point.d == 1e8]
    at_points = np.interp(np.log(points.get_xdata()), np.log(line.get_xdata()), line.get_ydata())
    assert at_points == pytest.approx(points.get_ydata(), rel=0.03)
    assert "active" in over_n.get_xlabel()
    file.write_text('{"fits": 7}')
    result = mlxmoe("plot", file)
    assert result.code == 2
    assert "mlxmoe fit" in result.err


def test_what_each_choice_of_a_sweep_learnt(mlxmoe, tmp_path, finished, dense):
    runs = {"long": finished, "short,0": dense, "short,1": dense}
    for name, run in runs.items():
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "short,1" / "metrics.jsonl").write_text(
        "".join(
            json.dumps(row | {key: row[key] + 1 for key in ("validation_loss",) if key in row}) + "\n"
            for row in jsonl.read(dense / "metrics.jsonl")
        )
    )
    planned = {name: {"choices": {"arm": name.partition(",")[0], "seed": name[-1:]}} for name in [*runs, "not begun"]}
    (tmp_path / "sweep.json").write_text(json.dumps(planned))
    over_tokens, over_flops = choices(tmp_path).axes
    assert [text.get_text() for text in over_tokens.get_legend().texts] == ["long", "short"]
    measured = [row["validation_loss"] for row in jsonl.read(dense / "metrics.jsonl") if "validation_loss" in row]
    for axes in (over_tokens, over_flops):
        assert axes.lines[1].get_ydata() == pytest.approx(np.array(measured) + 0.5)
        assert axes.lines[0].get_ydata()[: len(measured)] == pytest.approx(measured)
    result = mlxmoe("plot", tmp_path)
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"choices.svg", "choices.png"}
    (tmp_path / "sweep.json").write_text(json.dumps({"not begun": planned["not begun"]}))
    assert "no run in" in mlxmoe("plot", tmp_path).err


def test_what_is_no_run_is_said(mlxmoe, tmp_path, finished):
    result = mlxmoe("plot", tmp_path)
    assert result.code == 2
    assert f"no run at {tmp_path}" in result.err
    (tmp_path / "file").touch()
    result = mlxmoe("plot", finished, "--out", tmp_path / "file" / "figures")
    assert result.code == 2
    assert "cannot write" in result.err


@pytest.mark.parametrize("settings", [b"text.usetex: True\nlines.linewidth: 9\nno.such.key: 1\n", b"\xff\xfe", "fifo"])
def test_settings_in_the_working_folder_change_nothing(settings, figures, finished, tmp_path):
    if settings == "fifo":
        os.mkfifo(tmp_path / "matplotlibrc")
    else:
        (tmp_path / "matplotlibrc").write_bytes(settings)
    command = [sys.executable, "-m", "cli", "plot", finished, "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "²"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    for file in figures.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
