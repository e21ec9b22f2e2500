"""Every layout of a model over N GPUs: reject the illegal and infeasible with a reason, score the rest.

1 enumerate  pp · dp · ep · tp = N, attention groups of every size, slots beyond the least where routing is skewed
2 reject     by shape, by memory, by SLO: one line each
3 score      at every batch that fits (or at the batch that the load states)
4 choose     most tokens/s and GPU within the SLO; the Pareto front of that against latency is kept: output tokens
             and TPOT, or prompt tokens and TTFT where nothing is decoded
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import inf
from typing import NamedTuple

import msgspec

from soloist.errors import CapacityError
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.score import BATCHES, Options, Score, Scorer
from soloist.planner.traced import TracedCopies
from soloist.specs.cluster import ClusterSpec
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.workload import Load

MOST_GAIN = 1.6  # of replicas, below which a layout is not tried with them
TPOT_LIMIT_S = 0.1  # where the load states no SLO: slower than people read


class Rejection(NamedTuple):
    """A layout that cannot be used, and why in one line."""

    layout: str
    reason: str


class Found(NamedTuple):
    """The outcome of a search. `front`: fastest to slowest; `scores`: the best of each layout, best first."""

    best: Score
    front: list[Score]
    scores: list[Score]
    rejections: list[Rejection]
    single: Score | None  # the best with one expert per GPU
    considered: int


def layouts(gpus: int) -> Iterator[Layout]:
    """Every way to cut N GPUs."""
    for pp in divisors(gpus):
        for dp in divisors(gpus // pp):
            stage = gpus // pp // dp
            for tp in divisors(stage):
                for groups in divisors(stage // tp):
                    yield Layout(pp=pp, dp=dp, ep=stage // tp, tp=tp, attn_tp=stage // groups)


def illegal(model: ModelSpec, cluster: ClusterSpec, layout: Layout) -> str | None:
    """Why the layout makes no sense for that model on that cluster; None if it does."""
    if layout.pp > model.layers:
        return f"{layout.pp} stages for {model.layers} layers"
    if layout.tp > cluster.gpus_per_node or cluster.gpus_per_node % layout.tp:
        return f"an expert over {layout.tp} GPUs would cross nodes of {cluster.gpus_per_node}"
    if layout.attention_ranks > cluster.gpus_per_node:
        return f"attention over {layout.attention_ranks} GPUs would cross nodes in every layer"
    if layout.attention_ranks > model.attention.heads:
        return f"{layout.attention_ranks} GPUs share {model.attention.heads} heads"
    if layout.tp > 1 and model.expert.width // layout.tp < 64:
        return f"an expert's width of {model.expert.width} over {layout.tp} GPUs is less than a GEMM tile"
    if layout.ep > model.experts * 8:
        return f"{layout.ep} groups for {model.experts} experts: more than 8 replicas of each"
    return None


def search(
    model: ModelSpec,
    cluster: ClusterSpec,
    gpus: int,
    load: Load,
    scorer: Scorer,
    precision: Precision,
    options: Options | None = None,
    copies: TracedCopies | None = None,
) -> Found:
    """Raises CapacityError, listing why each layout failed, where none is left.

    copies: of a token of recorded routing; by default those of even routing.
    """
    cluster.nodes(gpus)
    scores: list[Score] = []
    tried: list[Score] = []
    rejections: list[Rejection] = []
    options = options or Options()

    def consider(deployment: Deployment) -> None:
        found = _scored(deployment, options, scorer, load)
        served = found if isinstance(found, str) else _served(found, load)
        if isinstance(served, str):
            rejections.append(Rejection(deployment.name, served))
        else:
            scores.extend(served)
        tried.extend(() if isinstance(found, str) else found)

    every = list(layouts(gpus))
    for layout in every:
        if reason := illegal(model, cluster, layout):
            rejections.append(Rejection(str(layout), reason))
        else:
            consider(deployed(model, cluster, layout, precision, load.skew, copies))
    for deployment in replicated(tried, load):
        consider(deployment)
    if not scores:
        raise CapacityError(_nothing_left(model, cluster, gpus, rejections))
    return _outcome(scores, rejections, len(every), load)


def deployed(
    model: ModelSpec,
    cluster: ClusterSpec,
    layout: Layout,
    precision: Precision,
    skew: float,
    copies: TracedCopies | None,
) -> Deployment:
    """The layout with every expert once, and a token's copies as they were recorded, where that says anything."""
    nodes, groups = (copies and copies.of(layout, cluster.gpus_per_node)) or (None, None)
    return Deployment(model=model, layout=layout, precision=precision, skew=skew, node_copies=nodes, rank_copies=groups)


def replicated(scores: list[Score], load: Load) -> list[Deployment]:
    """Where routing is skewed: the layouts that come near the best, with one and two more slots in each group."""
    if not load.skew or not scores:
        return []
    good = max(s.rate_per_gpu for s in scores) / MOST_GAIN
    near = {str(s.deployment.layout): s.deployment for s in scores if s.rate_per_gpu >= good}
    able = [d for d in near.values() if d.layout.ep > 1 and d.held < d.model.experts]
    return [msgspec.structs.replace(d, slots=d.held + more) for d in able for more in (1, 2)]


def batches(load: Load, layout: Layout, most: float, chunk_tokens: int) -> list[float] | str:
    """Sequences of an attention group to try; or why none can be. Prompts alone: no more than a step holds."""
    groups = layout.dp * layout.attention_groups
    if load.sequences:
        wanted = load.sequences / groups
        if wanted > most:
            return f"KV cache for {wanted:.0f} sequences an attention group does not fit, only {most:.1f}"
        return [wanted]
    held = inf if load.decodes else max(1.0, chunk_tokens / load.fresh)
    return [float(b) for b in BATCHES if b <= min(most, held)]


def _scored(deployment: Deployment, options: Options, scorer: Scorer, load: Load) -> list[Score] | str:
    """Scores at every batch up to the first that is too slow, or why there are none."""
    most = scorer.most_sequences(deployment, options)
    if most < 1:
        memory = scorer.memory(deployment, options, 1)
        part = max(memory, key=lambda name: memory[name])
        size = sum(memory.values()) / 1e9
        return f"{size:.0f} GB a GPU for one sequence, {part} {memory[part] / 1e9:.0f} GB of it"
    sizes = batches(load, deployment.layout, most, options.chunk_tokens)
    if isinstance(sizes, str):
        return sizes
    scores: list[Score] = []
    for size in sizes:
        scores.append(scorer.score(deployment, options, size))
        if scores[-1].tpot.value > limit_of(load):
            break  # larger batches are slower still
    return scores


def at_best(deployment: Deployment, options: Options, scorer: Scorer) -> Score:
    """A given deployment at the load's batch, or as much of it as fits; else at the batch with most tokens within the
    SLO, or with the least latency where none is. `most_sequences` must be 1 or more."""
    load, most = scorer.load, scorer.most_sequences(deployment, options)
    sizes = batches(load, deployment.layout, most, options.chunk_tokens)
    scores = [scorer.score(deployment, options, size) for size in ([most] if isinstance(sizes, str) else sizes)]
    quick = [score for score in scores if score.tpot.value <= limit_of(load)]
    quick = [score for score in quick if not load.ttft_s or score.ttft.value <= load.ttft_s]
    if not quick:
        return min(scores, key=lambda score: score.latency.value)
    return max(quick, key=lambda score: score.rate_per_gpu)


def limit_of(load: Load) -> float:
    """The largest TPOT in seconds that is of use."""
    return load.tpot_s or (float("inf") if load.sequences else TPOT_LIMIT_S)


def _served(scores: list[Score], load: Load) -> list[Score] | str:
    """Those that meet the SLO and the arrival rate."""
    able = [s for s in scores if s.request_rate.value >= load.rate]
    if not able:
        most = max(s.request_rate.value for s in scores)
        return f"serves {most:.1f} requests/s, not {load.rate:g}"
    limit = limit_of(load)
    quick = [s for s in able if s.tpot.value <= limit]
    if not quick:
        whose = "" if load.tpot_s else ", the limit without tpot=…"
        return f"TPOT {1e3 * min(s.tpot.value for s in able):.1f} ms is above {1e3 * limit:g} ms{whose}"
    first = [s for s in quick if not load.ttft_s or s.ttft.value <= load.ttft_s]
    if not first:
        return f"TTFT {min(s.ttft.value for s in quick):.2f} s is above {load.ttft_s:g} s"
    return [min(first, key=lambda s: s.latency.value)] if load.rate else first


def _outcome(scores: list[Score], rejections: list[Rejection], considered: int, load: Load) -> Found:
    ranked = sorted(scores, key=lambda s: -s.rate_per_gpu)
    if load.rate:  # the demand is met by all: the least latency wins
        ranked = sorted(scores, key=lambda s: s.latency.value)
    singles = [s for s in ranked if is_single(s.deployment)]
    best_of: dict[str, Score] = {}
    for score in ranked:
        best_of.setdefault(score.deployment.name, score)
    return Found(
        best=ranked[0],
        front=front(scores),
        scores=list(best_of.values()),
        rejections=rejections,
        single=singles[0] if singles else None,
        considered=considered,
    )


def front(scores: list[Score]) -> list[Score]:
    """Scores that no other beats in both throughput per GPU and latency, fastest first."""
    kept: list[Score] = []
    for score in sorted(scores, key=lambda s: (s.latency.value, -s.rate_per_gpu)):
        if not kept or score.rate_per_gpu > kept[-1].rate_per_gpu:
            kept.append(score)
    return kept


def is_single(deployment: Deployment) -> bool:
    """One whole expert on each GPU."""
    return deployment.held == 1 and deployment.layout.tp == 1


def _nothing_left(model: ModelSpec, cluster: ClusterSpec, gpus: int, rejections: list[Rejection]) -> str:
    reasons: dict[str, str] = {}
    for rejection in rejections:
        reasons.setdefault(rejection.reason, rejection.layout)
    shown = "; ".join(f"{layout}: {reason}" for reason, layout in list(reasons.items())[-4:])
    return (
        f"gpus = {gpus}: {model.name} fits nowhere on {cluster.name} ({shown}): use more GPUs, fewer bits, a looser SLO"
    )


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    return tuple(d for d in range(1, n + 1) if n % d == 0)
