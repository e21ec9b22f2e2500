"""`soloist simulate`: what the command line calls, and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from rich.table import Table

from soloist.errors import ConfigurationError
from soloist.planner.commands import console
from soloist.planner.refit import load_calibration
from soloist.simulator.deployment import Setup, simulate
from soloist.simulator.losses import Loss
from soloist.simulator.perfetto import Tracer
from soloist.simulator.plots import plot
from soloist.simulator.report import Result, Spread
from soloist.simulator.routing import Drift
from soloist.specs.cluster import ClusterSpec
from soloist.specs.model import ModelSpec
from soloist.specs.workload import Load

USUAL_RATE = 10.0  # requests/s


def run_simulate(
    plan: str | Path | None = None, model: ModelSpec | None = None, cluster: ClusterSpec | None = None,
    layout: str = "", load: str = "", requests: int = 1000, seed: int = 0, precision: str = "",
    trace: str | Path | None = None, lose: Sequence[str] = (), drift: str = "", as_json: bool = False,
    perfetto: str | Path | None = None, picture: str | Path | None = None, out: str | Path | None = None,
    calibration: str | Path | None = None, mixed_graphs: str = "",
) -> int:  # fmt: skip
    """What the command line calls. Prints a table, or JSON; writes the files that are asked for. Returns the status.

    `load`: where it is empty the plan's, at `USUAL_RATE` if that states neither rate nor sequences; of a trace its own
    times. `mixed_graphs`, as in the engine's option of this name, goes before what the plan says.
    """
    if plan:
        setup = Setup.of_plan(plan)
    elif model and cluster and layout:
        setup = Setup.of(model, cluster, layout, precision)
    else:
        raise ConfigurationError.of("plan", plan, "give a plan file, or --model, --cluster and --layout")
    if calibration:
        setup = replace(setup, calibration=load_calibration(calibration))
    if mixed_graphs:
        setup = replace(setup, options=replace(setup.options, mixed_graphs=mixed_graphs))
    wanted, deployed = Load.parse(load) if load or trace else usual(setup.load), setup.deployment.layout
    losses = [Loss.parse(text, setup.cluster.gpus_per_node) for text in lose]
    tracer = Tracer(deployed) if perfetto else None
    result, run = simulate(
        setup, wanted, requests, seed, trace, losses, drift_of(drift, wanted.skew) if drift else None, tracer
    )
    if tracer and perfetto:
        tracer.save(perfetto)
    if picture:
        plot(result, run.ledger, picture)
    if out:
        result.save(out)
    print(msgspec.json.encode(result).decode()) if as_json else show(result)
    return 0


def usual(load: Load) -> Load:
    """The same load with requests that arrive, if it does not say how."""
    return load if load.rate or load.sequences else replace(load, rate=USUAL_RATE)


def drift_of(text: str, skew: float) -> Drift:
    """`drift=60,rebalance=120,move=0.05` (seconds) over the load's skew. Raises ConfigurationError."""
    names = {"drift": "drift_s", "rebalance": "rebalance_s", "move": "move_s", "interval": "interval_s"}
    fields: dict[str, Any] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key not in names:
            raise ConfigurationError.of("drift", part, f"write key=seconds; keys are {', '.join(names)}")
        try:
            fields[names[key]] = float(value.removesuffix("s"))
        except ValueError:
            raise ConfigurationError.of(f"drift.{key}", value, "must be a number of seconds") from None
    if not skew:
        raise ConfigurationError.of("load.skew", skew, "without skew no expert is hotter than another; state skew=…")
    return Drift(skew=skew, **fields)


def show(result: Result) -> None:
    """Print a result for people."""
    shown = console()
    table = Table(title=f"{result.layout} on {result.gpus} GPUs", title_justify="left")
    for name in ("", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right" if name else "left")
    for name, spread_ in (("TTFT, ms", result.ttft_s), ("TPOT, ms", result.tpot_s), ("latency, ms", result.latency_s)):
        table.add_row(name, *_cells(spread_))
    shown.print(table)
    for line in _sentences(result):
        shown.print(line, highlight=False)


def _cells(values: Spread | None) -> list[str]:
    return [f"{1e3 * value:.1f}" for value in msgspec.structs.astuple(values)] if values else []


def _sentences(result: Result) -> list[str]:
    origins = ", ".join(f"{share:.0%} {name}" for name, share in sorted(result.origins.items()))
    lines = [
        f"{result.finished} of {result.requests} requests finished in {result.duration_s:.1f} s and {result.steps} "
        f"steps; {result.refused} refused, {result.resubmitted} resubmitted after a loss, {result.preemptions} "
        f"preemptions, {result.rebalancings} rebalancings.",
        f"Output {result.output_tps:.0f} tokens/s, {result.output_tps_per_gpu:.1f} a GPU; "
        f"{result.middle_output_tps:.0f} in the middle half of the time. Input {result.input_tps:.0f} tokens/s.",
        f"A GPU's time: {result.computing:.0%} computing, {result.links:.0%} waiting for links, the rest idle. Longest "
        f"queue {np.max(result.timeline.waiting):.0f}.",
    ]
    if result.met_slo is not None:
        lines.append(f"{result.met_slo:.1%} of the requests within the SLO.")
    if result.band is not None and origins:
        lines.append(f"Step times are predicted within ± {result.band:.0%} ({origins}).")
    return [*lines, *(f"{count} refused: {reason}" for reason, count in result.refusals.items())]
