"""`soloist crossovers`: where one layout or setting overtakes another, measured by others and predicted.

A point compares two settings by a ratio (above 1: the first is faster); a crossing names where the ratio passes 1. No
constant was fitted to a ratio. Exchange and experts of wider EP are rows of the published tables, most of which the
kernels' constants are fitted to; overlap's share of what it hides has a prior from the same source.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from soloist.planner.calibration import Calibration
from soloist.planner.compute import ExpertWork
from soloist.planner.exchange import ExchangeShape, row_bytes
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.routing import activated, imbalance
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Score, Scorer
from soloist.planner.step import Overlap
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load

PLAYBOOK, REQUESTS = "AMD MI300X playbook (vLLM 0.11, DeepSeek-R1, 8192/1024, 640 requests)", 640
H20 = "sgl-project/sglang#6823 (8 x H20, DeepSeek-R1, 1024/1024)"
H200 = "sgl-project/sglang#3602 (8 x H200, DeepSeek-V3, 180/400, 600 requests)"
TABLES = "aiconfigurator's tables for H100: DeepEP low latency, wideep_generation"
OVERLAP = "LMSYS 2025-05-05 (DeepSeek-V3 on H100, EP72 in decode, EP32 in prefill)"
SKEWED = "aiconfigurator's vLLM fused-MoE tables for H100 (4096 tokens, power law 1.2)"


class Point(NamedTuple):
    """`first` over `second` at a setting. `off`: why the prediction is known to miss it."""

    crossover: str
    first: str
    second: str
    at: str
    measured: float
    predict: Callable[[], float]
    source: str
    off: str = ""

    @property
    def agrees(self) -> bool:
        """The same winner."""
        return (self.predict() > 1) == (self.measured > 1)


class Crossing(NamedTuple):
    """The ratio passes 1 between two values of `unit` that were measured; `ratio` of a value is the prediction."""

    crossover: str
    unit: str
    low: float
    high: float
    ratio: Callable[[float], float]
    source: str
    off: str = ""

    def predicted(self) -> float:
        """Where the predicted ratio passes 1, between 1 and 4096."""
        low, high = 1.0, 4096.0
        rises = self.ratio(high) > self.ratio(low)
        for _ in range(20):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if (self.ratio(middle) < 1) == rises else (low, middle)
        return (low * high) ** 0.5

    @property
    def agrees(self) -> bool:
        return self.low <= self.predicted() <= self.high


@cache
def kernels(cluster_name: str) -> Kernels:
    """On a preset cluster, with the published constants."""
    return Kernels(cluster(cluster_name), Calibration.published())


def deepseek(
    cluster_name: str, layout: str, sequences: float, load: str, overlap: Overlap = "auto", skew: float = 0.0
) -> Score:
    """DeepSeek-V3 in fp8 under SGLang's constants, `sequences` in flight in all."""
    shape, wanted = Layout.parse(layout), Load.parse(load)
    deployment = Deployment(
        model=preset("deepseek-v3"), layout=shape, precision=Precision.named("fp8"), skew=skew
    )  # fmt: skip
    scorer = Scorer(kernels(cluster_name), Runtime.named("sglang", Calibration.published()), wanted)
    return scorer.score(deployment, Options(overlap=overlap), sequences / (shape.dp * shape.attention_groups))


def against(cluster_name: str, first: str, second: str, load: str, sequences: float, skew: float = 0.0) -> float:
    """Tokens/s of one layout over another's; `skew` of the first one's routing."""
    one = deepseek(cluster_name, first, sequences, load, skew=skew)
    return one.rate_per_gpu / deepseek(cluster_name, second, sequences, load).rate_per_gpu


def in_waves(cluster_name: str, first: str, second: str, sequences: float) -> float:
    """Tokens/s of one layout over another's with REQUESTS requests, `sequences` of them at a time: the playbook's run.

    Those of the first wave arrive together, so that all attention groups prefill in the same steps. The others arrive
    whenever one ends, each group by itself (`score.py`).
    """
    flying = min(sequences, REQUESTS)

    def tpot(layout: str) -> float:
        score = deepseek(cluster_name, layout, flying, "prompt=8192,output=1024")
        prefill = score.prefill.seconds.value / score.options.chunk_tokens * 8192
        together = score.decode.seconds.value + prefill * score.batch / 1024
        return together * flying / REQUESTS + score.tpot.value * (1 - flying / REQUESTS)

    return tpot(second) / tpot(first)


def layer_us(ep: int, tokens: float) -> float:
    """Exchange there and back and experts of one layer of DeepSeek-V3 in decode, `tokens` of each of `ep` GPUs."""
    known = kernels("dgx-h100")
    moved = 0.0
    for phase, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
        shape = ExchangeShape(
            mode="low_latency", ranks=ep, ranks_per_node=8, tokens=tokens, row_bytes=row_bytes(7168, dtype), top_k=8,
            experts=256,
        )  # fmt: skip
        moved += known.exchange(shape, phase).value
    active = activated(256 / ep, 256, 8, tokens * ep)
    work = ExpertWork(pairs=tokens * 8, active=active, hidden=7168, width=2048, dtype="fp8")
    return 1e6 * (moved + known.experts(work).value)


def wide_over_narrow(tokens: float) -> float:
    """EP64 against EP8."""
    return layer_us(8, tokens) / layer_us(64, tokens)


def overlap_gain(phase: str, tokens: float) -> float:
    """Throughput with two-batch overlap over that without, on 72 H100 (decode) or 32 (prefill)."""
    layout, gpus = ("ep72", 72) if phase == "decode" else ("ep32", 32)
    off, on = (
        deepseek("dgx-h100", layout, tokens * gpus, "prompt=4000,output=100", overlap) for overlap in ("off", "on")
    )
    times = [getattr(score, phase).seconds.value for score in (off, on)]
    return times[0] / times[1]


def skew_cost(hidden: int, width: int) -> float:
    """Time of the fullest of eight GPUs with one expert each over that of the mean, top-2 of eight experts."""
    known, tokens = kernels("dgx-h100"), 4096

    def rank(pairs: float) -> float:
        return known.experts(ExpertWork(pairs=pairs, active=1, hidden=hidden, width=width, dtype="bf16")).value

    return rank(tokens * 2 / 8 * imbalance(1.2, 8, 8, tokens, top_k=2)) / rank(tokens * 2 / 8)


ONE_NODE, WIDE, TWO_BATCHES, SKEW = "EP or TP on one node", "wider EP", "two-batch overlap", "skew, one expert a GPU"
POINTS = (
    Point(ONE_NODE, "DP8+EP", "TP8+EP", "64 requests", 1 / 1.52,
          partial(in_waves, "mi300x", "ep8", "attn8ep8", 64), PLAYBOOK),
    Point(ONE_NODE, "DP8+EP", "TP8+EP", "1024 requests", 1.47,
          partial(in_waves, "mi300x", "ep8", "attn8ep8", 1024), PLAYBOOK),
    Point(ONE_NODE, "EP8, skewed", "TP8", "128 requests", 2577 / 3002,
          partial(against, "hgx-h20", "attn8ep8", "tp8", "prompt=1024,output=1024", 128, 1.01), H20),
    Point(ONE_NODE, "EP8", "TP8", "600 requests", 1468 / 1403,
          partial(against, "hgx-h200", "attn8ep8", "tp8", "prompt=180,output=400", 600), H200),
    Point(WIDE, "EP64", "EP8", "32 tokens a GPU", (20 + 25 + 530) / (63 + 96 + 88),
          partial(wide_over_narrow, 32), TABLES),
    Point(WIDE, "EP64", "EP8", "128 tokens a GPU", (40 + 72 + 530) / (167 + 305 + 110),
          partial(wide_over_narrow, 128), TABLES),
    Point(TWO_BATCHES, "on", "off", "decode, 32 tokens a GPU", 1 - 0.27, partial(overlap_gain, "decode", 32), OVERLAP),
    Point(TWO_BATCHES, "on", "off", "decode, 256 tokens a GPU", 1.255, partial(overlap_gain, "decode", 256), OVERLAP),
    Point(TWO_BATCHES, "on", "off", "prefill", 1.31, partial(overlap_gain, "prefill", 64), OVERLAP),
    Point(SKEW, "even", "skewed", "Mixtral 8x22B's experts", 4.96 / 1.78, partial(skew_cost, 6144, 16384), SKEWED),
    Point(SKEW, "even", "skewed", "Mixtral 8x7B's experts", 3.01 / 1.16, partial(skew_cost, 4096, 14336), SKEWED),
)  # fmt: skip
CROSSINGS = (
    Crossing(ONE_NODE, "requests", 256, 512,
             partial(in_waves, "mi300x", "ep8", "attn8ep8"), PLAYBOOK),
    # At 256 tokens the exchange alone takes 881 µs in EP64 and 203 in EP8, whose experts take 530.
    Crossing(WIDE, "tokens a GPU", 128, 256, wide_over_narrow, TABLES),
    Crossing(TWO_BATCHES, "tokens a GPU", 64, 128, partial(overlap_gain, "decode"), OVERLAP),
)  # fmt: skip
