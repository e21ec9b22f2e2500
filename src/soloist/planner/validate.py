"""The cost model against tables of measurements: error of every row, mean absolute percentage error by table and role.

`fit` rows may have shaped the constants, `check` rows never did; `left-out` are the fit rows again, each predicted from
a fit to all the others. Rows with another role get a line of their own; what cannot be modelled is listed, not fatal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration, calibrated, left_out
from soloist.planner.deployments import end_to_end, own_runs
from soloist.planner.domains import Domain, domains
from soloist.planner.exchange import mode_named
from soloist.planner.refit import load_calibration
from soloist.planner.tables import PUBLISHED, TABLES, ExchangeRow, Row, RunRow, read_measurements, read_table
from soloist.planner.winners import Winner, winners

ROLES = ("fit", "check")
OWN_RUNS = "runs-"  # what our engine did on a machine, beside that machine's calibration
BARS = {"all_to_all": 0.08, "collectives": 0.10, "moe_gemm": 0.08, "end_to_end": 0.15}


class RowReport(msgspec.Struct, frozen=True, kw_only=True):
    """One value of one row. `error`: predicted over measured, minus one."""

    table: str
    role: str
    label: str
    metric: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class TableReport(msgspec.Struct, frozen=True, kw_only=True):
    """One table and role. Errors are shares, not percent."""

    table: str
    role: str
    rows: int
    mape: float
    median: float
    worst: float
    bar: float | None = None  # the promise for `check` rows


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `soloist validate` prints."""

    tables: list[TableReport]
    rows: list[RowReport]
    unknown_roles: list[str] = []
    skipped: list[str] = []
    assumed: list[str] = []  # of rows that were predicted all the same
    winners: list[Winner] = []  # of the layouts of our own engine's runs

    def mape(self, table: str, role: str) -> float:
        """Mean absolute percentage error as a share. Raises KeyError where there are no such rows."""
        return {(t.table, t.role): t.mape for t in self.tables}[table, role]

    def json(self) -> bytes:
        """One JSON document; `tables` holds objects with table, role, rows and mape."""
        rows = [{**msgspec.to_builtins(row), "error": row.error} for row in self.rows]
        winners = [{**msgspec.to_builtins(one), "verdict": one.verdict} for one in self.winners]
        document: dict[str, Any] = {**msgspec.to_builtins(self), "rows": rows, "winners": winners}
        return msgspec.json.encode(document)


def validate(folder: str | Path | None = None, calibration: Calibration | None = None, cross: bool = False) -> Report:
    """Predict every row of the tables in `folder` (CSV files named as in `TABLES`).

    By default these are the published ones and the runs of our own engine that come with Soloist, which a machine's own
    calibration predicts. `folder` may also be one file of our own measurements, as JSON lines.

    `cross` adds the leave-one-out errors of the fit rows, which takes some seconds. Raises ConfigurationError for a
    folder without any table and for rows that cannot be read.
    """
    calibration = calibration or Calibration.published()
    own = folder is not None and Path(folder).is_file()
    tables = read_measurements(str(folder)) if own else {name: read_table(name, folder) for name in TABLES}
    if not any(tables.values()):
        raise ConfigurationError.of("data", str(folder), f"holds none of {', '.join(f'{n}.csv' for n in TABLES)}")
    rows: list[RowReport] = []
    skipped: list[str] = []
    best: list[Winner] = []
    published = ((name, found, calibration) for name, found in tables.items())
    for name, found, used in chain(published, _own_runs() if folder is None else ()):
        for domain in domains_of(name, used):
            predicted = list(_predicted(name, domain, found, used, skipped))
            rows += (_report(name, domain, row, row.role, value) for row, value in predicted)
            rows += _left_out(name, domain, found) if cross and name != "runs" else []
            best += _winners(predicted)
    roles = sorted({row.role for found in tables.values() for row in found} - set(ROLES))
    assumed = _assumed(tables["all_to_all"])
    return Report(tables=_summary(rows), rows=rows, unknown_roles=roles, skipped=skipped, assumed=assumed, winners=best)


def _assumed(rows: Iterable[Row]) -> list[str]:
    """Modes of an exchange that are not known by name."""
    modes = Counter(row.mode for row in rows if isinstance(row, ExchangeRow) and mode_named(row.mode) is None)
    return [f"all_to_all: mode {mode!r} counts as normal in {times} rows" for mode, times in modes.items()]


def _own_runs() -> Iterator[tuple[str, list[Row], Calibration]]:
    """The runs that come with Soloist, with the calibration of the machine that they ran on."""
    for path in sorted(PUBLISHED.glob(f"{OWN_RUNS}*.jsonl")):
        yield "runs", read_measurements(path)["runs"], load_calibration(path.stem.removeprefix(OWN_RUNS))


def _winners(predicted: Iterable[tuple[Row, float]]) -> list[Winner]:
    return winners((row, seconds) for row, seconds in predicted if isinstance(row, RunRow) and row.role != "fit")


def domains_of(table: str, calibration: Calibration) -> tuple[Domain, ...]:
    """The domains that predict a table's columns."""
    if table == "end_to_end":
        return (end_to_end(calibration),)
    if table == "runs":
        return (own_runs(calibration),)
    return domains(calibration.machine)[table]


def _predicted(
    table: str, domain: Domain, rows: Iterable[Row], calibration: Calibration, skipped: list[str]
) -> Iterator[tuple[Row, float]]:
    """What can be predicted; `skipped` is told of the others."""
    for row in rows:
        if domain.measured(row):
            try:
                predicted = calibrated(domain, calibration, row)
            except ConfigurationError as error:
                skipped.append(f"{table}: {label(row)}: {error}")
                continue
            if predicted > 0:
                yield row, predicted
            else:
                skipped.append(f"{table}: {label(row)}: nothing happens between so few GPUs")


def _left_out(table: str, domain: Domain, rows: list[Row]) -> Iterator[RowReport]:
    for row, predicted in left_out(domain, [row for row in rows if row.role == "fit"]):
        yield _report(table, domain, row, "left-out", predicted)


def _report(table: str, domain: Domain, row: Row, role: str, predicted: float) -> RowReport:
    measured = domain.measured(row)
    assert measured is not None
    metric = getattr(row, "metric", domain.name if domain.name in ("dispatch", "combine") else "time")
    unit = getattr(row, "unit", "s" if isinstance(row, RunRow) else "us")
    return RowReport(
        table=table, role=role, label=label(row), metric=f"{metric} [{unit}]", measured=measured, predicted=predicted
    )


def _summary(rows: list[RowReport]) -> list[TableReport]:
    found: list[TableReport] = []
    for table, role in dict.fromkeys((row.table, row.role) for row in rows):
        errors = [abs(row.error) for row in rows if (row.table, row.role) == (table, role)]
        found.append(
            TableReport(
                table=table,
                role=role,
                rows=len(errors),
                mape=mean(errors),
                median=median(errors),
                worst=max(errors),
                bar=BARS.get(table) if role == "check" else None,
            )  # fmt: skip
        )
    return found


def label(row: Row) -> str:
    """What tells a row from the others of its table."""
    fields = msgspec.to_builtins(row)
    shown = ("library", "system", "model", "gpu", "gpus", "fabric", "mode", "layout", "collective", "phase", "dtype")
    sized = ("ep", "tokens", "group_tokens", "routing", "bytes", "batch", "sequences", "batch_per_gpu")
    sized += ("input_tokens", "context")
    names = [str(fields[key]) for key in shown if fields.get(key) not in (None, "")]
    return " ".join(names + [f"{key}={fields[key]}" for key in sized if fields.get(key) is not None])
