"""What the planner says about a point of a benchmark, and the least that the bytes and the arithmetic allow."""

from __future__ import annotations

from dataclasses import dataclass

from soloist.errors import ConfigurationError
from soloist.planner.bounds import decode_seconds
from soloist.planner.calibration import Calibration
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.workload import Load

CLUSTER = "h100-ib"
HBM = 3.0e12  # bytes/s, as measured; the datasheet's 3.35e12 is never reached


@dataclass(frozen=True)
class Expected:
    """Of a decode step and of prefill. `band`: relative half-width of the first."""

    tpot_s: float
    band: float
    prefill_tps: float
    floor_s: float  # of a decode step: weights and KV read once


def expected(spec: ModelSpec, layout: Layout, sequences: int, context: float, chunk: int = 2048) -> Expected | None:
    """On H100 nodes, `sequences` in the whole deployment; None for a layout that the planner does not know."""
    calibration = Calibration.published()
    kernels = Kernels(cluster(CLUSTER), calibration)
    each = max(1.0, sequences / (layout.dp * layout.attention_groups))
    try:
        deployment = Deployment(model=spec, layout=layout, precision=Precision.of(spec))
        load = Load(prompt=max(1, int(context)), output=1)
        scorer = Scorer(kernels, Runtime.named("soloist", calibration), load)
        score = scorer.score(deployment, Options(chunk_tokens=chunk), each)
    except ConfigurationError:
        return None
    step, peak = score.decode.seconds, kernels.cluster.gpu.bandwidth
    floor_s = decode_seconds(deployment, kernels, each, context) * peak / HBM
    return Expected(step.value, step.band, score.input_rate.value, floor_s)
