"""The comparison as a picture: throughput, latency, where time goes, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soloist.bench.figures import PHASES
from soloist.planner.plots import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]


def plot_compare(records: Sequence[Record], path: Path) -> None:
    """Four panels, one bar (or stack) a layout."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    first = records[0]
    figure.suptitle(
        f"{first['requests']} requests, {first['prompt_tokens']} prompt and {first['output_tokens']} output tokens, "
        + ("one run" if first["runs"] == 1 else f"median of {first['runs']} runs")
    )
    _bars(axes[0, 0], records, [("tps", "output tokens a second", 1)], "Throughput, tokens/s")
    _bars(axes[0, 1], records, [("tpot_p50_s", "p50", 1e3), ("tpot_p99_s", "p99", 1e3)], "TPOT, ms")
    _stack(axes[1, 0], records, [(f"{phase}_share", phase, 100) for phase in PHASES], "Share of ranks' time, %")
    kinds = [("bytes_inside_per_token", "inside nodes", 1e-3), ("bytes_across_per_token", "across nodes", 1e-3)]
    _stack(axes[1, 1], records, kinds, "Bytes sent for each token, kB")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(records: Sequence[Record]) -> list[str]:
    return [str(record["layout"]) for record in records]


def _bars(axis: Axes, records: Sequence[Record], keys: Sequence[tuple[str, str, float]], title: str) -> None:
    width = 0.8 / len(keys)
    for i, (key, label, factor) in enumerate(keys):
        positions = [x + (i - (len(keys) - 1) / 2) * width for x in range(len(records))]
        bars = axis.bar(positions, [record[key] * factor for record in records], width, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    _finish(axis, records, title, legend=len(keys) > 1)


def _stack(axis: Axes, records: Sequence[Record], keys: Sequence[tuple[str, str, float]], title: str) -> None:
    bottom = [0.0] * len(records)
    for key, label, factor in keys:
        values = [record[key] * factor for record in records]
        axis.bar(
            _names(records), values, 0.6, bottom=bottom, label=label, color="lightgrey" if label == "waiting" else None
        )
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    _finish(axis, records, title, legend=True)


def _finish(axis: Axes, records: Sequence[Record], title: str, legend: bool) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(records)), _names(records))
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)
