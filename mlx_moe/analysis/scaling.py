"""Scaling laws, fitted as in Hoffmann et al. 2022, approach 3.

L(N) = E + A/N^alpha, L(D) = E + B/D^beta, and L(N, D) = E + A/N^alpha + B/D^beta, by the Huber loss of the logarithms'
residuals. Every fit runs to convergence: stopped early, it gives other constants and far too narrow intervals
(Besiroglu et al. 2024). N parameters, D tokens, L nats per token.

P points, V variables of a law (one or two), K = 1 + 2 V constants; F fits, of other data or from other starts, batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from scipy.stats import norm, t

from mlx_moe.errors import InputError

Array = NDArray[np.float64]
LawName = Literal["N", "D", "ND"]

FORMULAS: dict[LawName, str] = {
    "N": "L(N) = E + A/N^alpha",
    "D": "L(D) = E + B/D^beta",
    "ND": "L(N, D) = E + A/N^alpha + B/D^beta",
}
CONSTANTS = {"N": ("A", "alpha"), "D": ("B", "beta")}  # per variable
HUBER_DELTA = 1e-3
START_EXPONENTS = (0.03, 0.08, 0.15, 0.25, 0.4, 0.6, 1.0, 1.6)  # per variable, in every combination
EXPONENTS = (1e-3, 5.0)  # the range searched
MAX_STEPS, TOLERANCE, PATIENCE = 500, 1e-8, 8  # of each resample; the fit itself runs to convergence
MOST_WORK, STEPS_AT_LEAST = 10_000_000, 40  # points times steps, so that noise without a law ends in seconds
MOST_DRAWN = 2_000_000  # points in all resamples: a gigabyte of memory
SAME_LOSS = 1e-12  # relative; smaller differences are rounding
SIZES, LOSSES = (1.0, 1e18), (1e-9, 1e9)  # ranges of N and D, and of losses; beyond, their powers overflow
NEGLIGIBLE = 12.0  # a term this far below the loss, as a logarithm, is negligible


@dataclass(frozen=True)
class Point:
    """Loss (nats per token) of a run with N parameters on D tokens."""

    n: float
    d: float
    loss: float
    run: str = ""


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law's constants by name, each with its interval at `level`, and the quality of the fit.

    `r_squared` is of the losses. `leave_one_out_error`: root mean square of each point's log-loss residual against the
    law fitted to the others; None if too few would be left. `draws`: the constants of every resample, in the order of
    `constants`. `optimal_exponent`, of L(N, D): the best N for C FLOPs grows like C to this power.
    """

    law: LawName
    constants: dict[str, Estimate]
    optimal_exponent: Estimate | None
    level: float
    r_squared: float
    leave_one_out_error: float | None
    degrees_of_freedom: int
    points: list[Point]
    predicted: list[float]
    draws: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "law": self.law,
            "formula": FORMULAS[self.law],
            "method": f"Huber loss (delta {HUBER_DELTA}) of log residuals; intervals from resampled residuals",
            **asdict(self),
            "points": [asdict(p) | {"predicted": q} for p, q in zip(self.points, self.predicted, strict=True)],
        }


def fit(points: Sequence[Point], law: LawName, resamples: int = 200, level: float = 0.9, seed: int = 0) -> Fit:
    """Fit a law, with intervals at `level` for its constants.

    Residuals are resampled `resamples` times. Each point's is taken from the law fitted to the others, since the Huber
    loss lets the law pass through as many points as it has constants. The intervals are expanded percentile intervals,
    with Student's t for the normal distribution (Hesterberg 2015, What teachers should know about the bootstrap).

    Raises InputError for fewer points, or fewer distinct N or D, than the constants need, for equal losses, and for
    numbers out of range.
    """
    x_PV, y_P = _check(points, law, resamples, level)
    n_points, n_constants = len(y_P), 1 + 2 * x_PV.shape[1]
    center_V = x_PV.mean(axis=0)  # centred, so that a coefficient and its exponent are almost uncorrelated
    x_PV = x_PV - center_V
    best_K = _search(x_PV, y_P)
    fitted_P = _log_loss(best_K[None], x_PV)[0]
    left_out_P = _left_out(x_PV, y_P, best_K) if n_points > n_constants + 1 else None
    shrunk = (n_points - n_constants) / n_points  # residual over noise variance; inverse when left out
    residuals_P = (y_P - fitted_P) / np.sqrt(shrunk) if left_out_P is None else left_out_P * np.sqrt(shrunk)
    residuals_P -= residuals_P.mean()
    generator = np.random.default_rng(seed)
    drawn_FP = residuals_P[generator.integers(0, n_points, (resamples, n_points))]
    drawn_FP += residuals_P.std() / np.sqrt(n_points) * generator.standard_normal(drawn_FP.shape)
    draws_FK = _polish(x_PV, fitted_P + drawn_FP, np.tile(best_K, (resamples, 1)))
    values, draws = _constants(best_K[None], center_V)[0], _constants(draws_FK, center_V)
    tail = float(norm.cdf(t.ppf((1 - level) / 2, n_points - n_constants)))
    losses_P, predicted_P = np.exp(y_P), np.exp(fitted_P)
    optimal = None
    if law == "ND":
        optimal = _estimate(values[4] / (values[2] + values[4]), draws[:, 4] / (draws[:, 2] + draws[:, 4]), tail)
    return Fit(
        law=law,
        constants={name: _estimate(values[i], draws[:, i], tail) for i, name in enumerate(constant_names(law))},
        optimal_exponent=optimal,
        level=level,
        r_squared=float(1 - ((losses_P - predicted_P) ** 2).sum() / ((losses_P - losses_P.mean()) ** 2).sum()),
        leave_one_out_error=None if left_out_P is None else float(np.sqrt(np.mean(left_out_P**2))),
        degrees_of_freedom=n_points - n_constants,
        points=list(points),
        predicted=predicted_P.tolist(),
        draws=draws.tolist(),
    )


def constant_names(law: LawName) -> list[str]:
    return ["E", *(name for variable in law for name in CONSTANTS[variable])]


def predict(law: LawName, constants: Sequence[float], n: Array, d: Array) -> Array:
    """Return the loss, nats per token, for constants in the order of `constant_names`."""
    terms = [values ** -constants[2 * i + 2] * constants[2 * i + 1] for i, values in enumerate(_variables(law, n, d))]
    return np.asarray(constants[0] + sum(terms))


def band(fitted: Fit, n: Array, d: Array) -> tuple[Array, Array]:
    """Return the interval of the law itself (not of single runs) at each N and D, at the fit's level."""
    losses = np.array([predict(fitted.law, draw, n, d) for draw in fitted.draws])
    tail = float(norm.cdf(t.ppf((1 - fitted.level) / 2, fitted.degrees_of_freedom)))
    low, high = np.quantile(losses, [tail, 1 - tail], axis=0)
    return low, high


def _check(points: Sequence[Point], law: LawName, resamples: int, level: float) -> tuple[Array, Array]:
    """Return (log N and D, log L) of the points. Raises InputError if no law can be fitted to them."""
    if not 0.5 <= level <= 0.999:
        raise InputError(f"level {level}: must be 0.5 to 0.999")
    needed = 2 * len(law) + 2
    if len(points) < needed:
        raise InputError(f"{FORMULAS[law]} has {needed - 1} constants and needs {needed} runs; there are {len(points)}")
    if resamples * len(points) > MOST_DRAWN or len(points) ** 2 > MOST_DRAWN:
        raise InputError(
            f"{resamples:,} resamples of {len(points):,} runs are too much; runs times resamples, and runs times runs, "
            f"may be {MOST_DRAWN:,}"
        )
    for point in points:
        for name, value, (low, high) in (("N", point.n, SIZES), ("D", point.d, SIZES), ("loss", point.loss, LOSSES)):
            if (name in law or name == "loss") and not low <= value <= high:
                raise InputError(f"run {point.run}: {name} is {value:.4g}, and a law needs {low:g} to {high:g}")
    values = _variables(law, np.array([p.n for p in points], float), np.array([p.d for p in points], float))
    for name, column in zip(law, values, strict=True):
        if (different := len(np.unique(column))) < 3:
            raise InputError(f"{FORMULAS[law]} needs runs of 3 different {name}; there are {different}")
    losses = [point.loss for point in points]
    if max(losses) - min(losses) < SAME_LOSS * max(losses):
        raise InputError(f"all {len(points)} runs have the loss {losses[0]:.4g}; a law needs some that differ")
    return np.log(np.stack(values, axis=1)), np.log(losses)


def _variables(law: LawName, n: Array, d: Array) -> list[Array]:
    return [np.asarray({"N": n, "D": d}[variable]) for variable in law]


def _search(x_PV: Array, y_P: Array) -> Array:
    """Return the minimum over many starts. For fixed exponents, a start is found by linear least squares."""
    starts = []
    for exponents_V in product(START_EXPONENTS, repeat=x_PV.shape[1]):
        columns = np.column_stack([np.ones(len(y_P)), np.exp(-np.array(exponents_V) * x_PV)])
        coefficients, _ = nnls(columns / np.exp(y_P)[:, None], np.ones(len(y_P)))
        visible = np.maximum(coefficients, np.exp(y_P.min() - NEGLIGIBLE / 2))
        starts.append([*np.log(visible), *exponents_V])
    ends_FK = _polish(x_PV, np.tile(y_P, (len(starts), 1)), np.array(starts))
    best_K = ends_FK[_huber(_log_loss(ends_FK, x_PV) - y_P).sum(axis=1).argmin()]
    exact = least_squares(
        lambda theta_K: _log_loss(theta_K[None], x_PV)[0] - y_P,
        best_K,
        jac=lambda theta_K: _jacobian(theta_K[None], x_PV)[0],
        bounds=_bounds(x_PV, y_P),
        loss="huber",
        f_scale=HUBER_DELTA,
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
        x_scale="jac",
    )
    return np.asarray(exact.x)


def _left_out(x_PV: Array, y_P: Array, best_K: Array) -> Array:
    """Return each point's residual from the law fitted to all others."""
    n_points = len(y_P)
    others_PP, y_PP = 1.0 - np.eye(n_points), np.tile(y_P, (n_points, 1))
    without_PK = _polish(x_PV, y_PP, np.tile(best_K, (n_points, 1)), others_PP)
    return y_P - np.diag(_log_loss(without_PK, x_PV))


def _polish(x_PV: Array, y_FP: Array, start_FK: Array, weight_FP: Array | None = None) -> Array:
    """Return the local minima of the starts, by Levenberg-Marquardt with the Huber loss as reweighted squares.

    Fits that have converged leave the batch. If the work limit is reached, the others keep their current values.
    """
    low_K, high_K = _bounds(x_PV, y_FP)
    ends_FK = np.clip(start_FK, low_K, high_K)
    theta_FK, weight_FP = ends_FK, np.ones_like(y_FP) if weight_FP is None else weight_FP
    residual_FP = _log_loss(theta_FK, x_PV) - y_FP
    cost_F, damping_F = (weight_FP * _huber(residual_FP)).sum(axis=1), np.full(len(y_FP), 1e-3)
    moving_F, standing_F = np.arange(len(y_FP)), np.zeros(len(y_FP), int)
    diagonal, work = np.arange(theta_FK.shape[1]), max(MOST_WORK, STEPS_AT_LEAST * y_FP.size)
    for _ in range(MAX_STEPS):
        work -= y_FP.size
        jacobian_FPK = _jacobian(theta_FK, x_PV)
        weighted_FKP = (jacobian_FPK * (weight_FP / np.maximum(1, np.abs(residual_FP) / HUBER_DELTA))[..., None]).mT
        hessian_FKK, gradient_FK1 = weighted_FKP @ jacobian_FPK, weighted_FKP @ residual_FP[..., None]
        hessian_FKK[:, diagonal, diagonal] *= 1 + damping_F[:, None]
        hessian_FKK[:, diagonal, diagonal] += 1e-12
        trial_FK = np.clip(theta_FK - np.linalg.solve(hessian_FKK, gradient_FK1)[..., 0], low_K, high_K)
        trial_residual_FP = _log_loss(trial_FK, x_PV) - y_FP
        trial_cost_F = (weight_FP * _huber(trial_residual_FP)).sum(axis=1)
        better_F = trial_cost_F < cost_F
        standing_F = np.where(trial_cost_F < (1 - TOLERANCE) * cost_F, 0, standing_F + 1)
        theta_FK = np.where(better_F[:, None], trial_FK, theta_FK)
        residual_FP = np.where(better_F[:, None], trial_residual_FP, residual_FP)
        cost_F = np.minimum(cost_F, trial_cost_F)
        damping_F = np.clip(np.where(better_F, damping_F / 5, damping_F * 5), 1e-9, 1e9)
        ends_FK[moving_F] = theta_FK
        if (goes_on_F := standing_F < PATIENCE).all() and work > 0:
            continue
        if work <= 0 or not goes_on_F.any():
            break
        theta_FK, y_FP, weight_FP, residual_FP = (a[goes_on_F] for a in (theta_FK, y_FP, weight_FP, residual_FP))
        cost_F, damping_F, moving_F, standing_F = (a[goes_on_F] for a in (cost_F, damping_F, moving_F, standing_F))
    return ends_FK


def _bounds(x_PV: Array, y: Array) -> tuple[Array, Array]:
    """Return bounds of log E, log coefficients (at the centre of the data) and exponents."""
    n_variables = x_PV.shape[1]
    low = [y.min() - NEGLIGIBLE] * (1 + n_variables) + [EXPONENTS[0]] * n_variables
    high = [y.max()] * (1 + n_variables) + [EXPONENTS[1]] * n_variables
    return np.array(low), np.array(high)


def _terms(theta_FK: Array, x_PV: Array) -> Array:
    """Return the logarithms of E and each variable's term, (F, P, 1 + V); theta: log E, log coefficients, exponents."""
    n_variables = x_PV.shape[1]
    powers_FPV = theta_FK[:, None, 1 : 1 + n_variables] - theta_FK[:, None, 1 + n_variables :] * x_PV
    constant_FP1 = np.broadcast_to(theta_FK[:, None, :1], (*powers_FPV.shape[:2], 1))
    return np.concatenate([constant_FP1, powers_FPV], axis=2)


def _log_loss(theta_FK: Array, x_PV: Array) -> Array:
    """Return the log losses (F, P)."""
    return np.logaddexp.reduce(_terms(theta_FK, x_PV), axis=2)


def _jacobian(theta_FK: Array, x_PV: Array) -> Array:
    """Return the Jacobian of `_log_loss`, (F, P, K): the terms' shares of the loss, and the exponents' derivatives."""
    terms = _terms(theta_FK, x_PV)
    shares = np.exp(terms - np.logaddexp.reduce(terms, axis=2)[..., None])
    return np.concatenate([shares, -shares[..., 1:] * x_PV], axis=2)


def _huber(residual: Array) -> Array:
    size = np.abs(residual)
    return np.where(size < HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))


def _constants(theta_FK: Array, center_V: Array) -> Array:
    """Return (F, K): E, then coefficient and exponent of each variable, for uncentred N and D."""
    n_variables = len(center_V)
    coefficients_FV, exponents_FV = theta_FK[:, 1 : 1 + n_variables], theta_FK[:, 1 + n_variables :]
    pairs = np.stack([np.exp(coefficients_FV + exponents_FV * center_V), exponents_FV], axis=2)
    return np.concatenate([np.exp(theta_FK[:, :1]), pairs.reshape(len(theta_FK), -1)], axis=1)


def _estimate(value: float, draws: Array, tail: float) -> Estimate:
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
