"""One model over EP = 16 … 1024: throughput, latency, network, efficiency, cost of imbalance."""

from __future__ import annotations

from typing import NamedTuple

from soloist.planner import bounds
from soloist.planner.calibration import Calibration
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Batch, Deployment, expert_load
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.workload import Load

DEGREES = (16, 32, 64, 128, 256, 512, 1024)


class SweepPoint(NamedTuple):
    """One EP degree. Rates in tokens/s; `imbalance` fullest over mean rows of a group under the load's skew."""

    ep: int
    slots: int
    input_rate: float
    output_rate: float
    tpot_ms: float
    band: float
    network: float
    efficiency: float
    imbalance: float
    lost: float  # share of throughput that skew costs


def sweep(
    model: ModelSpec, cluster_name: str, precision: Precision, load: Load, batch: float, calibration: Calibration
) -> list[SweepPoint]:
    """`batch` sequences a GPU at every degree; attention is data-parallel, as few slots a GPU as hold all experts."""
    spec = cluster(cluster_name)
    runtime = Runtime.named("soloist", calibration)
    points: list[SweepPoint] = []
    for ep in DEGREES:
        even, skewed = (
            Deployment(model=model, layout=Layout(ep=ep), precision=precision, skew=skew) for skew in (0.0, load.skew)
        )
        scorers = (Scorer(Kernels(spec, calibration), runtime, load) for _ in range(2))
        fair, real = (s.score(d, Options(), batch) for s, d in zip(scorers, (even, skewed), strict=True))
        rate = real.input_rate.value / ep
        crossing = bounds.nic_bytes_per_token(even, Kernels(spec, calibration))
        first = points[0] if points else None
        points.append(
            SweepPoint(
                ep=ep,
                slots=even.held,
                input_rate=real.input_rate.value,
                output_rate=batch * ep / real.decode.seconds.value,
                tpot_ms=1e3 * real.decode.seconds.value,
                band=real.decode.seconds.band,
                network=rate * crossing / spec.nic,
                efficiency=rate / (first.input_rate / first.ep) if first else 1.0,
                imbalance=expert_load(skewed, Batch("decode", batch, load.context)).fullest,
                lost=1 - real.input_rate.value / fair.input_rate.value,
            )
        )
    return points
