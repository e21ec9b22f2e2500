"""Fits calibrations: the one that comes with Soloist, from published `fit` rows alone, and a machine's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soloist.planner.calibration import Calibration, fit_calibration
from soloist.planner.deployments import end_to_end
from soloist.planner.domains import KERNELS, Domain
from soloist.planner.fitting import Prior
from soloist.planner.tables import TABLES, Row, read_measurements, read_table

OPEN = 0.7  # width of a prior for a machine's own constants


def published_rows() -> list[Row]:
    """All rows of all tables that come with Soloist."""
    return [row for name in TABLES for row in read_table(name)]


def calibrate_from(measurements: str | Path, name: str) -> Calibration:
    """A machine's own kernel constants, from a file of measurements. Only what was measured is in it."""
    rows = [row for table in read_measurements(measurements).values() for row in table]
    measured = [_open(domain) for domain in KERNELS if any(isinstance(row, domain.rows) for row in rows)]
    return fit_calibration(name, measured, rows)


def _open(domain: Domain) -> Domain:
    """The domain with priors that give way: a machine at hand may well differ from what was published."""

    def priors(path: tuple[str, ...]) -> dict[str, Prior]:
        known = domain.priors(path)
        return {key: Prior(prior.guess, max(prior.sigma, OPEN), prior.most) for key, prior in known.items()}

    return domain._replace(priors=priors)


def refit(name: str, rows: Sequence[Row]) -> Calibration:
    """Kernels first, then what serving systems add to them. Rows that are not `fit` are not looked at."""
    kernels = fit_calibration(name, KERNELS, rows)
    systems = fit_calibration(name, (end_to_end(kernels),), rows)
    return Calibration(name=name, fitted={**kernels.fitted, **systems.fitted})
