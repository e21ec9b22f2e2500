"""A load test as a picture: TTFT, TPOT and latency as cumulated shares, and tokens over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soloist.planner.plots import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_serve(requests: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Four panels."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    source = f"prompts of {summary['dataset']}; " if summary["dataset"] else ""
    figure.suptitle(
        f"{summary['requests']} requests, {summary['tps']:.0f} tokens/s, "
        f"{summary['met_slo']:.0%} within the SLO; {source}{summary['load']}",
        fontsize=9,
    )
    answered = [request for request in requests if request["error"] is None and request["ttft_s"] is not None]
    for axis, key, title, limit_s in (
        (axes[0, 0], "ttft_s", "TTFT, ms", summary["slo_s"]["ttft"]),
        (axes[0, 1], "tpot_s", "TPOT, ms", summary["slo_s"]["tpot"]),
        (axes[1, 0], "latency_s", "Whole request, ms", None),
    ):
        _cumulated(axis, [r[key] * 1e3 for r in answered if r[key] is not None], title)
        if limit_s:
            axis.axvline(limit_s * 1e3, color="tab:red", linestyle="--", linewidth=1, label="SLO")
            axis.legend(loc="best", fontsize=8)
    axes[1, 1].scatter([r["due_s"] for r in answered], [r["ttft_s"] * 1e3 for r in answered], s=6)
    axes[1, 1].set_title("TTFT (ms) by arrival (s)", fontsize=10)
    axes[1, 1].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cumulated(axis: Axes, values: Sequence[float], title: str) -> None:
    axis.plot(np.sort(values), np.arange(1, len(values) + 1) / max(len(values), 1))
    axis.set(ylim=(0, 1), ylabel="share of requests")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
