"""What the planner says beforehand about the points of `soloist.bench.node`.

Kernels and exchange as they were measured on two GPUs of the kind; more of them on a node are extrapolated from there.
"""

from __future__ import annotations

from typing import Any

from soloist.planner.kernels import Kernels, library_of
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Score, Scorer
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.workload import Load

MACHINES = {"H100": ("hgx-h100", "2xh100"), "H200": ("hgx-h200", "2xh200")}  # cluster and calibration, by GPU


def prefill(spec: ModelSpec, layout: Layout, count: int, tokens: int, chunk: int, gpu: str) -> dict[str, Any]:
    """Of `count` prompts of `tokens`, in steps of at most `chunk` tokens for an attention group."""
    score = _score(spec, layout, 1.0, Load(prompt=tokens, output=2), chunk, gpu)
    seconds = count * tokens / score.input_rate.value
    return _record("prefill", spec, layout, gpu, f"{count}x{tokens}", seconds, score.input_rate.band)


def decode(spec: ModelSpec, layout: Layout, sequences: int, context: float, gpu: str) -> dict[str, Any]:
    """Of a decoding step of `sequences` in the whole deployment."""
    each = max(1.0, sequences / (layout.dp * layout.attention_groups))
    score = _score(spec, layout, each, Load(prompt=int(context), output=2), 2048, gpu)
    return _record("TPOT", spec, layout, gpu, str(sequences), score.decode.seconds.value, score.decode.seconds.band)


def _score(spec: ModelSpec, layout: Layout, each: float, load: Load, chunk: int, gpu: str) -> Score:
    host, machine = MACHINES[gpu]
    used = load_calibration(machine)
    kernels = Kernels(cluster(host), used, library_of("soloist", used))
    scorer = Scorer(kernels, Runtime.named("soloist", used), load)
    deployment = Deployment(model=spec, layout=layout, precision=Precision.of(spec))
    return scorer.score(deployment, Options(chunk_tokens=chunk, overlap="off"), each)


def _record(
    what: str, spec: ModelSpec, layout: Layout, gpu: str, shape: str, seconds: float, band: float
) -> dict[str, Any]:
    """The keys are those of `bench.offline`'s records."""
    named = {"what": what, "model": spec.name, "layout": str(layout), "gpu": gpu, "shape": shape}
    return named | {"predicted_s": round(seconds, 6), "band": round(band, 3)}
