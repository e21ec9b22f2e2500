"""Fitted constants, how well they predict what they were not fitted to, and over which range they were fitted.

`Calibration.published()` comes with Soloist, fitted to the `fit` rows of the published tables. A calibration file
written for the machine at hand has the same form; `fit_calibration` makes one from any rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from math import exp, inf, log, log2
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.domains import Domain
from soloist.planner.estimate import Estimate, Origin
from soloist.planner.fitting import Prior, centred, fit
from soloist.planner.tables import PUBLISHED, Row
from soloist.specs.cluster import ClusterSpec
from soloist.specs.files import read_record, write_record
from soloist.specs.model import Spec

NARROW = 0.5  # how far (in the logarithm) a narrower level's constants may leave the wider level's
UNMEASURED = 0.35  # band of a prediction from physical priors alone
MATCH = 0.01  # relative distance within which a point counts as measured
DOUBT = 0.1  # weight of the formula against the points near by, where their misfits correct it
NEAR = 0.7  # doublings: the width of the Gaussian by which a point counts as near


class Fitted(Spec, frozen=True, kw_only=True, dict=True):
    """One level's constants. `band`: typical relative error at rows left out of the fit; `points`: where rows lay.

    `misfits`: of each point the logarithm of measured over predicted, where predictions near it are to be corrected by
    it: on one machine, whose points agree with each other. Published ones come from many.
    """

    constants: dict[str, float]
    band: float
    rows: int
    points: list[dict[str, float]] = []
    misfits: list[float] = []

    @cached_property
    def box(self) -> dict[str, tuple[float, float]]:
        """Range of each coordinate of the points."""
        names = self.points[0] if self.points else {}
        return {name: (min(p[name] for p in self.points), max(p[name] for p in self.points)) for name in names}

    def correction(self, at: dict[str, float], but: int | None = None) -> float:
        """Factor on the formula at these coordinates, from the misfits of the points near by; `but` leaves one out.

        A mean over points, each weighing less by a Gaussian of its distance in doublings, and over the formula itself
        (Nadaraya 1964, with a prior at 1), so that far from all points the formula stands alone.
        """
        if not self.misfits or not at:
            return 1.0
        weights = [exp(-0.5 * _distance2(at, point) / NEAR**2) for point in self.points]
        if but is not None:
            weights[but] = 0.0
        pull = sum(weight * misfit for weight, misfit in zip(weights, self.misfits, strict=True))
        return exp(pull / (sum(weights) + DOUBT))

    @cached_property
    def known(self) -> set[tuple[int, ...]]:
        """The points, for looking one up."""
        return {_rounded(point.items()) for point in self.points}


class Calibration(Spec, frozen=True, kw_only=True, dict=True):
    """`fitted["dispatch/low_latency/deepep-v1"]` and the like."""

    name: str
    fitted: dict[str, Fitted]
    machine: ClusterSpec | None = None  # that its own points were measured on
    format: str = "soloist-calibration/1"

    @classmethod
    def published(cls) -> Calibration:
        """Constants for the GPUs, fabrics and libraries of the published tables."""
        return _published()

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises ConfigurationError for a file that is not a calibration."""
        return read_record(path, cls, "calibration")

    def save(self, path: str | Path) -> None:
        write_record(path, self)

    def over(self, wider: Calibration) -> Calibration:
        """This calibration where it has something, else the wider one (a machine's own over the published)."""
        fitted = {**wider.fitted, **self.fitted}
        return Calibration(name=f"{self.name} over {wider.name}", fitted=fitted, machine=self.machine or wider.machine)

    def has(self, key: str) -> bool:
        """Whether anything was measured for that key."""
        return key in self.fitted

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs whose kernels were measured by themselves."""
        return (self.machine.gpu.name,) if self.machine else ()

    def find(self, domain: str, *path: str) -> Found:
        """The narrowest fitted level on the way to `domain/path…`. Raises ConfigurationError where none is."""
        if (domain, path) not in self._cache:
            self._cache[domain, path] = self._find(domain, path)
        return self._cache[domain, path]

    def _find(self, domain: str, path: tuple[str, ...]) -> Found:
        for depth in range(len(path), 0, -1):
            key = "/".join((domain, *path[:depth]))
            if key in self.fitted:
                return Found(key, self.fitted[key], exact=depth == len(path))
        known = ", ".join(sorted(key for key in self.fitted if key.startswith(domain)))
        raise ConfigurationError.of("calibration", f"{domain}/{'/'.join(path)}", f"not calibrated; there are {known}")

    @cached_property
    def _cache(self) -> dict[tuple[str, tuple[str, ...]], Found]:
        return {}


class Found(NamedTuple):
    """Constants that were found, and whether they were fitted for just what was asked."""

    key: str
    fitted: Fitted
    exact: bool

    @property
    def constants(self) -> dict[str, float]:
        return self.fitted.constants

    def estimate(self, seconds: float, coordinates: dict[str, float]) -> Estimate:
        """A prediction with these constants, with its band and origin by where it lies."""
        origin, stretch = self._support(tuple(coordinates.items()))
        corrected = seconds * self.fitted.correction(coordinates)
        return Estimate(corrected, min(0.6, self.fitted.band * stretch), origin)

    def _support(self, coordinates: tuple[tuple[str, float], ...]) -> tuple[Origin, float]:
        box = self.fitted.box
        if not box:
            return "extrapolated", 2.0
        outside = sum(_outside(box[name], value) for name, value in coordinates if name in box)
        if outside or not self.exact:
            return "extrapolated", 1.25 + 0.5 * outside
        if _rounded(coordinates) in self.fitted.known:
            return "measured", 1.0
        return "interpolated", 1.0


def _rounded(coordinates: Iterable[tuple[str, float]]) -> tuple[int, ...]:
    """Equal for points within about 1 %."""
    return tuple(round(log(max(value, 1e-9)) / MATCH) for _, value in coordinates)


def _distance2(at: dict[str, float], point: dict[str, float]) -> float:
    """Squared distance in doublings, by the coordinates that both have."""
    return sum(log2(max(at[name], 1e-9) / max(value, 1e-9)) ** 2 for name, value in point.items() if name in at)


def _outside(ends: tuple[float, float], value: float) -> float:
    """How many doublings `value` lies outside `ends`; infinitely many where no point had any of it."""
    low, high = ends
    if value > high * (1 + MATCH):
        return log2(value / high) if high else inf
    return log2(low / value) if 0 < value < low * (1 - MATCH) else 0.0


@cache
def _published() -> Calibration:
    return Calibration.load(PUBLISHED / "published.json")


def fit_domain(domain: Domain, rows: Sequence[Row], near: Row | None = None) -> dict[str, dict[str, float]]:
    """Constants of every level that has rows, by key; with `near`, of the levels on that row's path only."""
    used = [row for row in rows if domain.measured(row)]
    goal = domain.path(near) if near else ()
    found: dict[str, dict[str, float]] = {}
    for depth in range(1, 1 + max((len(domain.path(row)) for row in used), default=0)):
        for path in dict.fromkeys(domain.path(row)[:depth] for row in used):
            if near and path != goal[:depth]:
                continue
            level = [row for row in used if domain.path(row)[:depth] == path]
            found["/".join((domain.name, *path))] = _fit_level(domain, path, level, found)
    return found


def _fit_level(
    domain: Domain, path: tuple[str, ...], rows: list[Row], found: dict[str, dict[str, float]]
) -> dict[str, float]:
    priors = domain.priors(path)
    if parent := found.get("/".join((domain.name, *path[:-1]))):
        priors = centred(priors, parent, NARROW)
    pairs = [(row, (domain.measured(row) or 0.0,)) for row in rows]
    return fit(lambda constants, row: (domain.predict(constants, row),), pairs, priors)


def predict_row(domain: Domain, fitted: dict[str, dict[str, float]], row: Row) -> float:
    """A row's prediction with the narrowest constants that there are for it; the priors' where there are none."""
    path = domain.path(row)
    for depth in range(len(path), 0, -1):
        if constants := fitted.get("/".join((domain.name, *path[:depth]))):
            return domain.predict(constants, row)
    priors: dict[str, Prior] = dict(domain.priors(path))
    return domain.predict({name: prior.guess for name, prior in priors.items()}, row)


def calibrated(domain: Domain, calibration: Calibration, row: Row) -> float:
    """A row's prediction as plans have it: the narrowest constants, corrected by the machine's own points near by."""
    constants = {key: fitted.constants for key, fitted in calibration.fitted.items()}
    path = domain.path(row)
    keys = ("/".join((domain.name, *path[:depth])) for depth in range(len(path), 0, -1))
    found = next((calibration.fitted[key] for key in keys if key in calibration.fitted), None)
    return predict_row(domain, constants, row) * (found.correction(domain.coordinates(row)) if found else 1.0)


def left_out(domain: Domain, rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Each row with its prediction (µs) from a fit to all other rows: leave-one-out cross-validation."""
    used = [row for row in rows if domain.measured(row)]
    others = ([other for other in used if other is not row] for row in used)
    return [
        (row, predict_row(domain, fit_domain(domain, rest, row), row)) for row, rest in zip(used, others, strict=True)
    ]


def fit_machine(name: str, domains: Iterable[Domain], rows: Sequence[Row], machine: ClusterSpec | None) -> Calibration:
    """A machine's own calibration: constants, and misfits that correct them near the points where they were measured.

    The band is the typical error at a point that is left out of the correction.
    """
    fitted: dict[str, Fitted] = {}
    for domain in domains:
        mine = [row for row in rows if isinstance(row, domain.rows) and row.role == "fit" and domain.measured(row)]
        for key, constants in fit_domain(domain, mine).items():
            level = [row for row in mine if key == _key(domain, row, key)]
            misfits = [log(_value(domain, row) / domain.predict(constants, row)) for row in level]
            found = msgspec.structs.replace(_fitted(domain, constants, level, misfits), misfits=_short(misfits))
            left = [misfit - log(found.correction(found.points[i], i)) for i, misfit in enumerate(misfits)]
            band = 1.5 * max(0.02, sum(map(abs, left)) / len(left))
            fitted[key] = msgspec.structs.replace(found, band=round(band, 4))
    return Calibration(name=name, fitted=fitted, machine=machine)


def _short(values: Iterable[float]) -> list[float]:
    return [round(value, 5) for value in values]


def fit_calibration(name: str, domains: Iterable[Domain], rows: Sequence[Row]) -> Calibration:
    """A calibration from rows of any tables. Rows whose role is not `fit` are not looked at."""
    fitted: dict[str, Fitted] = {}
    for domain in domains:
        mine = [row for row in rows if isinstance(row, domain.rows) and row.role == "fit"]
        errors = {id(row): abs(log(us / _value(domain, row))) for row, us in left_out(domain, mine)}
        for key, constants in fit_domain(domain, mine).items():
            level = [row for row in mine if id(row) in errors and key == _key(domain, row, key)]
            fitted[key] = _fitted(domain, constants, level, [errors[id(row)] for row in level])
    return Calibration(name=name, fitted=fitted)


def _fitted(domain: Domain, constants: dict[str, float], rows: list[Row], errors: list[float]) -> Fitted:
    points: list[dict[str, float]] = [domain.coordinates(row) for row in rows]
    rounded = {name: float(f"{value:.6g}") for name, value in constants.items()}
    band = max(0.03, sum(map(abs, errors)) / len(errors)) * 1.5 if errors else UNMEASURED
    return Fitted(constants=rounded, band=round(band, 4), rows=len(rows), points=points)


def _key(domain: Domain, row: Any, key: str) -> str:
    """The row's own key at the depth of `key`."""
    return "/".join((domain.name, *domain.path(row)[: key.count("/")]))


def _value(domain: Domain, row: Row) -> float:
    value = domain.measured(row)
    assert value is not None
    return value
