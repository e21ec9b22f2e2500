"""What a simulation showed: latencies, throughput, utilisation over time; as a record and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from soloist.simulator.ledger import StepLog
from soloist.simulator.simulation import Simulation
from soloist.specs.files import write_record
from soloist.specs.model import Spec

PERCENTILES = (50, 90, 95, 99)
BINS = 100


class Spread(Spec, frozen=True, kw_only=True):
    """Mean, percentiles and largest of a quantity."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread | None:
        """None where there are no values."""
        if not len(values):
            return None
        found = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
        return cls(mean=float(values.mean()), max=float(values.max()), **found)


class Timeline(Spec, frozen=True, kw_only=True):
    """Quantities over time, each the mean of one of equal bins. Shares are those of one GPU of a stage.

    `computing` and `links`: time in which the critical path computes, and in which rows travel unhidden. `balance`:
    tokens of the mean attention group over those of the fullest, while there are steps.
    """

    time_s: list[float]  # where each bin begins
    computing: list[float]
    links: list[float]
    balance: list[float]
    waiting: list[float]  # sequences without a token yet
    running: list[float]  # sequences that have their first token
    context: list[float]  # tokens that are attended to
    imbalance: list[float]  # fullest expert group over mean
    output_tps: list[float]  # tokens/s
    input_tps: list[float]  # tokens/s


class Result(Spec, frozen=True, kw_only=True):
    """One simulation. Times in seconds, rates of the whole deployment; None where nothing was to be measured.

    `middle_output_tps` leaves out the first and the last quarter of the time. `met_slo` is the share of requests within
    the load's TTFT and TPOT. `band`: relative error band of the predicted step times; `origins`: what carries them.
    """

    layout: str
    gpus: int
    requests: int
    finished: int
    refused: int
    resubmitted: int
    steps: int
    duration_s: float
    output_tps: float
    output_tps_per_gpu: float
    middle_output_tps: float
    input_tps: float
    ttft_s: Spread | None
    tpot_s: Spread | None
    latency_s: Spread | None
    met_slo: float | None
    computing: float
    links: float
    preemptions: int
    rebalancings: int
    timeline: Timeline
    refusals: dict[str, int] = {}
    band: float | None = None
    origins: dict[str, float] = {}
    format: str = "soloist-simulation/1"

    def save(self, path: str | Path) -> None:
        write_record(path, self)


def result_of(run: Simulation, ttft_s: float = 0.0, tpot_s: float = 0.0) -> Result:
    """Sum up a finished simulation. `ttft_s` and `tpot_s` are the SLO; 0: none."""
    ledger, steps, requests = run.ledger, run.steps, run.requests
    line = timeline(run)
    duration_s = run.end_s - float(np.nanmin(ledger.arrival_s))
    outputs = int(requests.outputs[ledger.finished].sum())
    prompts = int(requests.prompts[ledger.finished].sum())
    rate = outputs / duration_s if duration_s else 0.0
    return Result(
        layout=str(run.layout),
        gpus=run.layout.size,
        requests=len(requests),
        finished=int(ledger.finished.sum()),
        refused=len(ledger.refused),
        resubmitted=int(np.maximum(ledger.submissions - 1, 0).sum()),
        steps=len(steps),
        duration_s=duration_s,
        output_tps=rate,
        output_tps_per_gpu=rate / run.layout.size,
        middle_output_tps=float(np.mean(line.output_tps[BINS // 4 : BINS - BINS // 4])),
        input_tps=prompts / duration_s if duration_s else 0.0,
        ttft_s=Spread.of(ledger.ttft_s),
        tpot_s=Spread.of(ledger.tpot_s),
        latency_s=Spread.of(ledger.latency_s),
        met_slo=met(run, ttft_s, tpot_s),
        computing=float(np.mean(line.computing)),
        links=float(np.mean(line.links)),
        preemptions=sum(scheduler.stats.preemptions for replica in run.replicas for scheduler in replica.schedulers),
        rebalancings=run.routing.rebalancings if run.routing else 0,
        timeline=line,
        refusals=dict(Counter(ledger.refused.values()).most_common(5)),
    )


def met(run: Simulation, ttft_s: float, tpot_s: float) -> float | None:
    """Share of all requests that finished within the SLO; None where there is none."""
    if not ttft_s and not tpot_s:
        return None
    ledger = run.ledger
    good = ledger.finished
    if ttft_s:
        good = good & (ledger.first_s - ledger.arrival_s <= ttft_s)
    if tpot_s:
        each = (ledger.finish_s - ledger.first_s) / np.maximum(run.requests.outputs - 1, 1)
        good = good & (each <= tpot_s)
    return float(good.mean())


def timeline(run: Simulation) -> Timeline:
    """Spread every step evenly over the time that it took."""
    rows, width = run.steps, run.end_s / BINS
    edges = np.linspace(0.0, run.end_s, BINS + 1)
    start_s, end_s, until_s = rows["start_s"], rows["end_s"], held_until(rows)

    def spent(amount: np.ndarray) -> np.ndarray:
        """`[bins]` mean rate at which `amount` is spent in each bin."""
        return np.diff(_spent(edges, start_s, end_s, amount)) / width

    def level(values: np.ndarray) -> np.ndarray:
        """`[bins]` mean of what `values` are from each step to the next."""
        return np.diff(_spent(edges, start_s, until_s, values * (until_s - start_s))) / width

    def present(from_s: np.ndarray, to_s: np.ndarray) -> np.ndarray:
        """`[bins]` mean number of finished requests that are between two of their times."""
        done = run.ledger.finished
        return np.diff(_spent(edges, from_s[done], to_s[done], (to_s - from_s)[done])) / width

    stepping = np.maximum(level(np.ones(len(rows))), 1e-12)
    evenness = (rows["decodes"] + rows["prefills"]) / run.layout.attention_groups / rows["peak"]
    answered = run.ledger.finished & (run.ledger.requests.outputs > 0)
    firsts = np.histogram(run.ledger.first_s[answered], edges)[0] / width
    return Timeline(
        time_s=_list(edges[:-1]),
        computing=_list(spent(rows["stage_s"] - rows["links_s"]) / run.layout.dp),
        links=_list(spent(rows["links_s"]) / run.layout.dp),
        balance=_list(level(evenness) / stepping),
        waiting=_list(present(run.ledger.arrival_s, run.ledger.first_s)),
        running=_list(present(run.ledger.first_s, run.ledger.finish_s)),
        context=_list(level(rows["context"])),
        imbalance=_list(level(rows["imbalance"]) / stepping),
        output_tps=_list(spent(rows["decodes"]) + firsts),
        input_tps=_list(spent(rows["prefills"])),
    )


def held_until(rows: StepLog) -> np.ndarray:
    """`[steps]` until when each step tells the state of its replica: its end, or the next step's start."""
    until_s, replica, start_s = rows["end_s"], rows["replica"], rows["start_s"]
    for number in np.unique(replica):
        mine = np.flatnonzero(replica == number)
        until_s[mine[:-1]] = np.minimum(until_s[mine[:-1]], start_s[mine[1:]])
    return until_s


def _spent(edges: np.ndarray, start_s: np.ndarray, end_s: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """`[edges]` what of `amount` is spent before each edge: a sum of ramps from `start_s` to `end_s`.

    Σ rate · max(0, t − start) − Σ rate · max(0, t − end), by prefix sums over the sorted times.
    """
    rate = amount / np.maximum(end_s - start_s, 1e-12)
    return _ramps(edges, start_s, rate) - _ramps(edges, end_s, rate)


def _ramps(edges: np.ndarray, begin_s: np.ndarray, rate: np.ndarray) -> np.ndarray:
    order = np.argsort(begin_s, kind="stable")
    rates = np.concatenate([[0.0], np.cumsum(rate[order])])
    moments = np.concatenate([[0.0], np.cumsum((rate * begin_s)[order])])
    before = np.searchsorted(begin_s[order], edges)
    return rates[before] * edges - moments[before]


def _list(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
