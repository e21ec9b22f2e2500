"""Constants from measurements: maximum a posteriori in the logarithm, robust against single odd rows.

Every constant has a prior (a physical guess and how sure it is), so that few rows suffice, a constant that no row
constrains keeps its physical value, and a model fitted to small messages still has sensible bandwidths for large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Constants = Mapping[str, float]
R = TypeVar("R")
NOISE = 0.03  # relative scatter of a published measurement


class Prior(NamedTuple):
    """A positive constant is about `guess`, within a factor of exp(`sigma`). `most` bounds it from above."""

    guess: float
    sigma: float
    most: float = np.inf


def fit(
    predict: Callable[[Constants, R], Sequence[float]],
    rows: Sequence[tuple[R, Sequence[float]]],
    priors: Mapping[str, Prior],
) -> dict[str, float]:
    """Constants that explain `rows`, pairs of (row, measured values). `predict` gives as many values for a row."""
    from scipy.optimize import least_squares  # half a second, which plans from fitted constants need not wait for

    names = list(priors)
    guess = np.log([priors[n].guess for n in names])
    sigma = np.array([priors[n].sigma for n in names])
    most = np.log([priors[n].most for n in names])
    measured = np.log([value for _, values in rows for value in values])

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = dict(zip(names, np.exp(x).tolist(), strict=True))
        predicted = np.log([value for row, _ in rows for value in predict(constants, row)])
        return np.concatenate([_soft((predicted - measured) / NOISE), (x - guess) / sigma])

    if not rows:
        return dict(zip(names, np.exp(guess).tolist(), strict=True))
    start = np.minimum(guess, most - 1e-6)
    found = least_squares(
        residuals, start, bounds=(np.full(len(names), -np.inf), most), x_scale=sigma, ftol=1e-5, xtol=1e-4
    )
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))


def centred(priors: Mapping[str, Prior], constants: Constants, sigma: float) -> dict[str, Prior]:
    """The same priors, moved to constants fitted to a wider set of rows and at most `sigma` wide."""
    return {n: Prior(min(constants[n], p.most), min(p.sigma, sigma), p.most) for n, p in priors.items()}


def _soft(r: np.ndarray) -> np.ndarray:
    """Residuals whose square grows only linearly beyond 2 (soft L1)."""
    return np.sign(r) * 2.0 * np.sqrt(2.0 * (np.sqrt(1.0 + (r / 2.0) ** 2) - 1.0))
