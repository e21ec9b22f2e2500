"""Fits calibrations: the one that comes with Soloist, from published `fit` rows alone, and a machine's own."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration, fit_calibration, fit_machine
from soloist.planner.deployments import end_to_end, own_runs
from soloist.planner.domains import Domain, domains, kernels
from soloist.planner.fitting import Prior
from soloist.planner.tables import PUBLISHED, TABLES, Row, read_measurements, read_table
from soloist.specs.cluster import measured_cluster, preset_gpus
from soloist.specs.files import read_text

OPEN = 0.7  # width of a prior for a machine's own constants
PEAK = 1.05  # of a datasheet's rate that an efficiency may reach


def published_rows() -> list[Row]:
    """All rows of all tables that come with Soloist."""
    return [row for name in TABLES for row in read_table(name)]


def refit(name: str, rows: Sequence[Row]) -> Calibration:
    """Kernels first, then what serving systems add to them. Rows that are not `fit` are not looked at."""
    fitted = fit_calibration(name, kernels(), rows)
    systems = fit_calibration(name, (end_to_end(fitted),), rows)
    return Calibration(name=name, fitted={**fitted.fitted, **systems.fitted})


# -- a machine's own --------------------------------------------------------------------------------------------------
def load_calibration(path: str | Path | None) -> Calibration:
    """The published constants, and over them those of a file: what `soloist calibrate` wrote, or a `Calibration`.

    A name without a suffix is a machine that comes with Soloist: `2xh100`.
    """
    if path is None:
        return Calibration.published()
    if (shipped := PUBLISHED / f"{path}.jsonl").is_file():
        path = shipped
    elif not Path(path).suffix and not Path(path).exists():
        known = sorted(found.stem for found in PUBLISHED.glob("[0-9]*.jsonl"))
        raise ConfigurationError.of("calibration", str(path), f"is no file; with Soloist come {', '.join(known)}")
    own = _fitted_in(Path(path)) if Path(path).suffix == ".jsonl" else Calibration.load(path)
    return own.over(Calibration.published())


def _fitted_in(path: Path) -> Calibration:
    """The calibration that stands in a file of measurements; where none does, one is fitted to them."""
    for line in reversed(read_text(path, "calibration").splitlines()):
        if line.startswith('{"what":"calibration"'):
            try:
                return msgspec.json.decode(line, type=_Record).calibration
            except msgspec.DecodeError as error:
                raise ConfigurationError.of("calibration", str(path), f"is not a calibration file: {error}") from error
    return calibrate_from(path, path.stem)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    calibration: Calibration


def record(calibration: Calibration) -> bytes:
    """A calibration as a line of a file of measurements."""
    return msgspec.json.encode({"what": "calibration", "calibration": calibration}) + b"\n"


def calibrate_from(measurements: str | Path, name: str) -> Calibration:
    """A machine's own constants, from a file of measurements. Only what was measured is in it.

    Raises ConfigurationError for a file without any measurement that the cost model knows.
    """
    tables, machine = read_measurements(measurements), measured_cluster(measurements)
    rows = [row for table in tables.values() for row in table]
    if not rows:
        raise ConfigurationError.of("calibration", str(measurements), f"holds no records of {', '.join(TABLES)}")
    known = domains(machine)
    limit = PEAK if machine is None or machine.gpu.name in preset_gpus() else inf
    used = [_open(domain, limit) for name, found in known.items() if tables[name] for domain in found]
    fitted = fit_machine(name, used, rows, machine)
    if not any(row.role == "fit" for row in tables["runs"]):
        return fitted
    systems = fit_machine(name, (own_runs(fitted.over(Calibration.published())),), rows, machine)
    return Calibration(name=name, fitted={**fitted.fitted, **systems.fitted}, machine=machine)


def _open(domain: Domain, most: float) -> Domain:
    """The domain with priors that give way: a machine at hand may well differ from what was published.

    `most`: what an efficiency may reach, which where peaks were measured is no bound at all.
    """

    def priors(path: tuple[str, ...]) -> dict[str, Prior]:
        known: Any = domain.priors(path)
        return {key: Prior(prior.guess, max(prior.sigma, OPEN), max(prior.most, most)) for key, prior in known.items()}

    return domain._replace(priors=priors)
