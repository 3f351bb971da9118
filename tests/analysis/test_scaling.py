import json
import time
import warnings

import numpy as np
import pytest
from scipy.stats import binom

from mlx_moe.analysis.scaling import Point, band, constant_names, fit, predict
from mlx_moe.errors import InputError

CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # Hoffmann et al. 2022, appendix D.3


def values(law):
    return [CHINCHILLA[name] for name in constant_names(law)]


def points_on_the_curve(law, n_each=5, noise=None):
    sizes, tokens = (
        grid.ravel() for grid in np.meshgrid(np.geomspace(7e7, 1.6e10, n_each), np.geomspace(5e9, 5e11, 5))
    )
    if law != "ND":
        sizes, tokens = np.geomspace(7e7, 1.6e10, n_each), np.geomspace(5e9, 5e11, n_each)
    losses = predict(law, values(law), sizes, tokens)
    if noise is not None:
        losses = losses * np.exp(noise.normal(0, 0.003, len(losses)))
    return [Point(*point) for point in zip(sizes, tokens, losses, strict=True)]


@pytest.mark.parametrize("law", ["N", "D", "ND"])
def test_constants_come_back_from_points_on_chinchillas_curve(law):
    fitted = fit(points_on_the_curve(law), law, resamples=20)
    for name, estimate in fitted.constants.items():
        assert estimate.value == pytest.approx(CHINCHILLA[name], rel=1e-6), name
    assert fitted.r_squared == pytest.approx(1)
    assert fitted.leave_one_out_error < 1e-6
    if law == "ND":
        assert fitted.optimal_exponent.value == pytest.approx(0.28 / 0.62)


def test_intervals_cover_as_often_as_they_say():
    sets, level = 40, 0.9
    hits = dict.fromkeys(constant_names("N"), 0)
    for number in range(sets):
        points = points_on_the_curve("N", 12, np.random.default_rng(number))
        for name, estimate in fit(points, "N", resamples=60, level=level).constants.items():
            hits[name] += estimate.low <= CHINCHILLA[name] <= estimate.high
    fewest, most = binom.interval(0.99, sets, level)
    assert all(fewest <= n <= most for n in hits.values()), hits


def test_noise_shows_in_the_figures():
    points = points_on_the_curve("ND", noise=np.random.default_rng(0))
    fitted = fit(points, "ND", resamples=50)
    assert 0.001 < fitted.leave_one_out_error < 0.01
    assert 0.99 < fitted.r_squared < 0.99999
    assert all(e.low < e.value < e.high for e in fitted.constants.values())
    assert fitted.degrees_of_freedom == 20


def test_one_failed_run_hardly_moves_the_fit():
    points = points_on_the_curve("N", 12)
    points[5] = Point(points[5].n, points[5].d, 1.2 * points[5].loss)
    assert fit(points, "N", resamples=20).constants["alpha"].value == pytest.approx(0.34, rel=0.01)


def test_the_band_is_narrow_among_the_runs_and_wide_beyond():
    points = points_on_the_curve("N", 12, np.random.default_rng(1))
    fitted = fit(points, "N", resamples=100)
    among, beyond = np.array([1e9]), np.array([1e13])
    widths = [np.subtract(*reversed(band(fitted, n, n))) for n in (among, beyond)]
    assert 0 < widths[0] < widths[1] / 3
    low, high = band(fitted, among, among)
    constants = [estimate.value for estimate in fitted.constants.values()]
    assert low < predict("N", constants, among, among) < high


def test_the_same_seed_draws_the_same_intervals():
    points = points_on_the_curve("N", 8, np.random.default_rng(2))
    one, other, third = (fit(points, "N", resamples=30, seed=seed) for seed in (0, 0, 1))
    assert one == other
    assert one.constants["E"].low != third.constants["E"].low


def test_points_without_a_law_in_them_end_in_seconds_and_without_a_warning():
    random = np.random.default_rng(3)
    sizes, tokens = np.exp(random.uniform(10, 40, (2, 60)))
    points = [Point(*point) for point in zip(sizes, tokens, np.exp(random.normal(0, 3, 60)), strict=True)]
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(points, "ND", resamples=1000)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 0}, r"run odd: N is 0, and a law needs 1 to 1e\+18"),
        ({"n": -1}, "N is -1"),
        ({"n": 1e308}, r"N is 1e\+308"),
        ({"n": float("nan")}, "N is nan"),
        ({"loss": 0.0}, "loss is 0"),
        ({"loss": float("inf")}, "loss is inf"),
        ({"loss": 1e308}, r"loss is 1e\+308"),
    ],
)
def test_numbers_without_a_power_are_refused(change, said):
    odd = Point(**{"n": 10.0, "d": 10.0, "loss": 3.0, "run": "odd"} | change)
    with pytest.raises(InputError, match=said):
        fit([*points_on_the_curve("N"), odd], "N")


def test_what_there_is_too_much_of():
    points = points_on_the_curve("N", 100)
    with pytest.raises(InputError, match=r"1,000,000,000 resamples of 100 runs are too much"):
        fit(points, "N", resamples=10**9)
    with pytest.raises(InputError, match=r"level nan: must be 0\.5 to 0\.999"):
        fit(points, "N", level=float("nan"))


@pytest.mark.parametrize("options", [("--seed", -1), ("--resamples", 10**9), ("--level", "nan"), ("--law", "x")])
def test_options_of_fit_that_are_none(options, mlxmoe, tmp_path):
    rows = [
        {"run": str(n), "status": "finished", "parameters_non_embedding": n, "tokens": 10, "validation_loss": 1 + 1 / n}
        for n in range(1, 9)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = mlxmoe("fit", tmp_path, *options)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl"}


def test_too_little_to_fit_to():
    with pytest.raises(InputError, match="all 8 runs have the loss 3"):
        fit([Point(n, 1e9, 3.0) for n in range(1, 9)], "N")
    with pytest.raises(InputError, match="has 3 constants and needs 4 runs; there are 3"):
        fit(points_on_the_curve("N", 3), "N")
    with pytest.raises(InputError, match="needs runs of 3 different D; there are 1"):
        fit([Point(n, 1e9, 3.0) for n in range(1, 9)], "D")
