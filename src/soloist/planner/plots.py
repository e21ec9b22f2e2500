"""Plots of the planner as PNG or SVG files. They need the `plot` extra; matplotlib is imported when one is drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soloist.planner.validate import Report

COLOURS = {"fit": "#7a8ba3", "check": "#d1495b", "left-out": "#edae49"}


def pyplot() -> Any:
    """matplotlib without a display. Raises ModuleNotFoundError where the extra `plot` is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def drawn(draw: Callable[[Path], None], path: Path) -> list[Path]:
    """`[path]` when `draw` has made it. Without matplotlib there is none, and stderr says so."""
    try:
        draw(path)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(f"no {path.name}: it needs matplotlib; in a checkout: pip install '.[plot]'", file=sys.stderr)
        return []
    return [path]


def plot_validation(report: Report, path: str | Path) -> None:
    """Predicted over measured for every row, a panel for each table, the band of ±10 % shaded."""
    plt = pyplot()
    tables = list(dict.fromkeys(row.table for row in report.rows))
    figure, axes = plt.subplots(1, len(tables), figsize=(3.6 * len(tables), 3.6), squeeze=False)
    for axis, table in zip(axes[0], tables, strict=True):
        _panel(axis, [row for row in report.rows if row.table == table], table)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _panel(axis: Any, rows: list[Any], title: str) -> None:
    values = [row.measured for row in rows]
    ends = [min(values) * 0.8, max(values) * 1.25]
    axis.fill_between(ends, [0.9 * e for e in ends], [1.1 * e for e in ends], color="#e8ecf1", linewidth=0)
    axis.plot(ends, ends, color="#444444", linewidth=0.8)
    for role in dict.fromkeys(row.role for row in rows):
        mine = [row for row in rows if row.role == role]
        x, y = [row.measured for row in mine], [row.predicted for row in mine]
        axis.scatter(x, y, s=18, label=role, color=COLOURS.get(role, "#5b8e7d"))
    axis.set(xscale="log", yscale="log", title=title, xlabel="measured", ylabel="predicted")
    axis.legend(fontsize=7)
