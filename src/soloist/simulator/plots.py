"""A picture of a simulation. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from soloist.planner.plots import pyplot
from soloist.simulator.ledger import Ledger
from soloist.simulator.report import Result

CURVES = (
    ("tokens/s", ("output_tps", "input_tps")),
    ("sequences", ("running", "waiting")),
    ("share of time", ("computing", "links")),
    ("ratio", ("balance", "imbalance")),
)


def plot(result: Result, ledger: Ledger, path: str | Path) -> None:
    """Throughput, queue and utilisation over time, and the distributions of TTFT and TPOT. The suffix is the format."""
    plt = pyplot()
    figure, axes = plt.subplots(3, 2, figsize=(11, 9), layout="constrained")
    for axis, (unit, names) in zip(axes.flat, CURVES, strict=False):
        _curves(axis, result, unit, names)
    _distribution(axes.flat[4], "TTFT", ledger.ttft_s)
    _distribution(axes.flat[5], "TPOT", ledger.tpot_s)
    figure.suptitle(f"{result.layout} on {result.gpus} GPUs, {result.finished} requests")
    figure.savefig(path)
    plt.close(figure)


def _curves(axis: Any, result: Result, unit: str, names: tuple[str, ...]) -> None:
    for name in names:
        axis.plot(result.timeline.time_s, getattr(result.timeline, name), label=name.replace("_tps", ""))
    axis.set(xlabel="seconds", ylabel=unit, ylim=(0, None))
    axis.legend()


def _distribution(axis: Any, name: str, seconds: np.ndarray) -> None:
    axis.plot(1e3 * np.sort(seconds), np.linspace(0, 1, len(seconds)))
    axis.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1), xlim=(0, None))
