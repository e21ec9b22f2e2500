"""What the command line shows of the planner: one function a command, tables by rich. Each returns the exit status."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from soloist.planner.calibration import Calibration
from soloist.planner.plots import plot_validation
from soloist.planner.refit import published_rows, refit
from soloist.planner.tables import PUBLISHED
from soloist.planner.validate import Report, validate


def run_validate(
    data: str | Path | None = None, as_json: bool = False, cross: bool = False, plot: str | Path | None = None,
    calibration: str | Path | None = None,
) -> int:  # fmt: skip
    """Predictions against published (or `data`'s) tables. Status 1 where a table misses its bar on `check` rows."""
    used = Calibration.load(calibration).over(Calibration.published()) if calibration else None
    report = validate(data, used, cross)
    if plot:
        plot_validation(report, plot)
    if as_json:
        print(report.json().decode())
    else:
        _print_validation(report, console())
    return int(any(table.bar is not None and table.mape > table.bar for table in report.tables))


def run_refit() -> int:
    """Write the calibration that comes with Soloist anew."""
    refit("published", published_rows()).save(PUBLISHED / "published.json")
    return 0


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


def _print_validation(report: Report, out: Console) -> None:
    rows = Table(title="Predicted against measured", title_justify="left")
    for name in ("table", "role", "row", "metric"):
        rows.add_column(name, overflow="fold", no_wrap=name == "table")
    for name in ("measured", "predicted", "error"):
        rows.add_column(name, justify="right")
    for row in report.rows:
        error = f"[{'green' if abs(row.error) < 0.1 else 'red'}]{row.error:+.1%}"
        rows.add_row(row.table, row.role, row.label, row.metric, f"{row.measured:g}", f"{row.predicted:.4g}", error)
    out.print(rows)
    summary = Table(title="Mean absolute percentage error", title_justify="left")
    for name in ("table", "role", "values", "MAPE", "median", "worst", "bar"):
        summary.add_column(name, justify="left" if name in ("table", "role") else "right")
    for table in report.tables:
        bar = "" if table.bar is None else f"≤ {table.bar:.0%} {'✓' if table.mape <= table.bar else '✗'}"
        shares = (f"{value:.1%}" for value in (table.mape, table.median, table.worst))
        summary.add_row(table.table, table.role, str(table.rows), *shares, bar)
    out.print(summary)
    if report.unknown_roles:
        out.print(f"Roles other than fit and check: {', '.join(report.unknown_roles)}")
    for line in report.skipped:
        out.print(f"Not modelled: {line}")
