import json
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from mlx_moe.analysis.plots import expert_load, loss
from mlx_moe.analysis.record import read_record
from mlx_moe.training import log

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
    rows = log.read(finished / "metrics.jsonl")
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


def test_what_is_no_run_is_said(mlxmoe, tmp_path, finished):
    result = mlxmoe("plot", tmp_path)
    assert result.code == 2
    assert f"no run at {tmp_path}" in result.err
    (tmp_path / "file").touch()
    result = mlxmoe("plot", finished, "--out", tmp_path / "file" / "figures")
    assert result.code == 2
    assert "cannot write" in result.err
