"""Fits the calibration that comes with Soloist, from the `fit` rows of the published tables alone."""

from __future__ import annotations

from collections.abc import Sequence

from soloist.planner.calibration import Calibration, fit_calibration
from soloist.planner.deployments import end_to_end
from soloist.planner.domains import KERNELS
from soloist.planner.tables import TABLES, Row, read_table


def published_rows() -> list[Row]:
    """All rows of all tables that come with Soloist."""
    return [row for name in TABLES for row in read_table(name)]


def refit(name: str, rows: Sequence[Row]) -> Calibration:
    """Kernels first, then what serving systems add to them. Rows that are not `fit` are not looked at."""
    kernels = fit_calibration(name, KERNELS, rows)
    systems = fit_calibration(name, (end_to_end(kernels),), rows)
    return Calibration(name=name, fitted={**kernels.fitted, **systems.fitted})
