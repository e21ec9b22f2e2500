"""One decoder layer on one rank, as a list of parts with their times.

Two kinds of parts: what computes and what communicates. Which of them overlap is decided above (`step.py`).
"""

from __future__ import annotations

from functools import lru_cache
from math import log
from typing import NamedTuple

import msgspec

from soloist.planner.compute import BYTES, PADDED_TOKENS, DecodeAttention, ExpertWork
from soloist.planner.estimate import ZERO, Estimate, total
from soloist.planner.exchange import ExchangeShape, Mode, lays_out, row_bytes
from soloist.planner.kernels import OWN_LIBRARY, Kernels, Parts
from soloist.planner.precision import Precision
from soloist.planner.routing import activated, busiest, distinct, imbalance, straggler
from soloist.planner.runtime import Runtime
from soloist.planner.ways import Way, way
from soloist.planner.weights import held_kv_heads, kv_elements
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, Spec

COMMUNICATION = ("dispatch", "combine", "attention exchange", "expert exchange")


class Deployment(Spec, frozen=True, kw_only=True):
    """What runs where. `slots`: of an expert group in a layer, 0: every expert once. `skew`: routing's power law.

    `node_copies` and `rank_copies`: distinct nodes and expert groups of a token, where a routing trace told them
    (`traced.TracedCopies`); the formulas for even routing otherwise.
    """

    model: ModelSpec
    layout: Layout
    precision: Precision
    slots: int = 0
    skew: float = 0.0
    mode: Mode | None = None  # None: the fastest of those that the cluster can do
    node_copies: float | None = None
    rank_copies: float | None = None

    @property
    def name(self) -> str:
        """The layout, with its slots where they are more than the least."""
        return str(self.layout) + (f" x {self.slots} slots" if self.slots else "")

    @property
    def held(self) -> int:
        """Slots of the fullest group."""
        return max(self.slots, -(-self.model.experts // self.layout.ep))

    @property
    def replicas(self) -> int:
        """Slots beyond one for each expert."""
        return self.held * self.layout.ep - self.model.experts if self.slots else 0


class Batch(NamedTuple):
    """What one attention group does in a step: `tokens` new ones, each seeing `context` on average.

    padded: tokens of the graph that holds the step, 0 if none does; experts and exchange see those of the step alone.
    Decoding steps have graphs of so many sizes that theirs counts as just as large as they are.
    share: tokens of a group on average over `tokens`, where groups differ and this is the one with most.
    """

    phase: str
    tokens: float
    context: float
    padded: float = 0.0
    share: float = 1.0

    @property
    def is_decode(self) -> bool:
        return self.phase == "decode"

    @property
    def is_captured(self) -> bool:
        return self.padded > 0

    @property
    def rows(self) -> float:
        """Tokens that attention's projections and the small kernels see."""
        return self.padded or self.tokens

    @property
    def half(self) -> Batch:
        """Of two equal parts."""
        return Batch(self.phase, self.tokens / 2, self.context, self.padded / 2, self.share)


def dense_parts(d: Deployment, batch: Batch, kernels: Kernels, runtime: Runtime, window: int | None) -> Parts:
    """A layer with a dense feed-forward."""
    matrices = 2 if d.model.expert.kind == "mlp" else 3
    return {
        **_attention_parts(d, batch, kernels, runtime, window),
        "dense layers": _feed_forward(d, batch, d.model.dense_width, matrices, kernels, runtime),
    }


def moe_parts(d: Deployment, batch: Batch, kernels: Kernels, runtime: Runtime, window: int | None) -> Parts:
    """A layer with experts."""
    parts = dict(_attention_parts(d, batch, kernels, runtime, window))
    load = expert_load(d, batch)
    fullest = load.fullest * runtime["imbalance"] if d.layout.ep > 1 else 1.0
    work = ExpertWork(
        pairs=load.pairs * fullest,
        active=load.active,
        hidden=d.model.d_model,
        width=d.model.expert.width / d.layout.tp,
        matrices=d.model.expert.matrices,
        dtype=d.precision.experts_on(d.model, d.layout.tp),
        slowdown=runtime["expert_flops"],
        gathered=d.layout.ep > 1 and batch.tokens / d.layout.attention_ranks > PADDED_TOKENS,
        fused=kernels.library == OWN_LIBRARY,
    )
    parts["experts"] = kernels.experts(work).times(_slowdown(batch, runtime))
    if d.model.shared_width:
        key = ("shared", d.model.name, d.precision, d.layout.attention_ranks, batch.rows, runtime.name)
        width = d.model.shared_width
        shared = kernels.once(key, lambda: {"shared experts": _feed_forward(d, batch, width, 3, kernels, runtime)})
        parts |= shared
    return {**parts, **_exchange_parts(d, batch, load, kernels, runtime)}


class ExpertLoad(NamedTuple):
    """Of an expert group in one layer: rows on average, experts touched by the group that has most, fullest over mean
    rows, rows received."""

    pairs: float
    active: float
    fullest: float
    received: float


def expert_load(d: Deployment, batch: Batch) -> ExpertLoad:
    """Expected load under uniform or power-law routing."""
    model, ep = d.model, d.layout.ep
    tokens = batch.tokens * batch.share * d.layout.attention_groups
    pairs = tokens * model.router.top_k / ep
    reached = d.rank_copies or distinct(ep, max(model.experts, ep), model.router.top_k)
    replicas = max(0, d.held * ep - model.experts)
    drawn = 4 ** round(log(max(64, tokens), 4))  # the law depends on tokens only weakly
    fullest = imbalance(d.skew, model.experts, ep, drawn, replicas, model.router.top_k) if d.skew else 1.0
    copies = d.held * ep / model.experts  # tokens of an expert are shared by its replicas
    active = activated(d.held, model.experts, model.router.top_k, tokens / max(1.0, copies))
    active = busiest(d.held, active, ep)
    return ExpertLoad(pairs, active, fullest * min(2.0, straggler(ep, pairs)), tokens * reached / ep)


def _attention_parts(d: Deployment, batch: Batch, kernels: Kernels, runtime: Runtime, window: int | None) -> Parts:
    """The attention half of a layer. It depends on the attention group alone, so layouts share it."""
    step = batch.phase, batch.tokens, batch.context, batch.padded
    key = (d.model.name, d.precision, d.layout.attention_ranks, step, window, runtime.name)
    return kernels.once(key, lambda: _attention_half(d, batch, kernels, runtime, window))


def _attention_half(d: Deployment, batch: Batch, kernels: Kernels, runtime: Runtime, window: int | None) -> Parts:
    ranks = d.layout.attention_ranks
    context = min(batch.context, window) if window else batch.context
    matrices = _projections(d.model, ranks)
    projections = total(kernels.matmul(batch.rows, n, k, d.precision.linear) for n, k in matrices)
    own = batch.rows / ranks
    return {
        "projections": projections.times(_slowdown(batch, runtime)),
        "attention": _attention(d, batch, context, kernels).times(_slowdown(batch, runtime)),
        "attention exchange": _attention_exchange(d, batch, kernels),
        "layer": _between(d, batch, own, kernels, runtime),
    }


def _slowdown(batch: Batch, runtime: Runtime) -> float:
    """Of the system's large kernels against the calibrated ones."""
    return runtime["kernels"] * (1.0 if batch.is_decode else runtime["prefill"])


def _attention_exchange(d: Deployment, batch: Batch, kernels: Kernels) -> Estimate:
    """A sum over the attention group; our engine gathers the tokens of larger steps before and scatters them after."""
    ranks, size = d.layout.attention_ranks, batch.rows * d.model.d_model * 2
    if kernels.library != OWN_LIBRARY or batch.rows < kernels.replicates_below(ranks):
        return kernels.collective("all_reduce", ranks, size)
    return total(kernels.collective(kind, ranks, size) for kind in ("all_gather", "reduce_scatter"))


def _between(d: Deployment, batch: Batch, own: float, kernels: Kernels, runtime: Runtime) -> Estimate:
    """What lies between the large kernels: measured as it is, and what the runtime adds."""
    fixed = runtime["layer_us"] + (0.0 if batch.is_captured else runtime["eager_us"])
    rest = total((kernels.stream(runtime["layer_passes"] * 2 * own * d.model.d_model), _fixed(1e-6 * fixed)))
    if kernels.library != OWN_LIBRARY:
        return rest
    a, ranks = d.model.attention, d.layout.attention_ranks
    columns = -(-a.heads // ranks) * a.head_dim + kv_elements(d.model, ranks)
    tokens = batch.rows if batch.rows < kernels.replicates_below(ranks) else own
    return total((kernels.small(tokens, d.model.d_model, columns, d.model.experts), rest))


def _attention(d: Deployment, batch: Batch, context: float, kernels: Kernels) -> Estimate:
    a, ranks = d.model.attention, d.layout.attention_ranks
    heads = -(-a.heads // ranks)
    if not batch.is_decode:
        kv_heads = held_kv_heads(d.model, ranks) if a.kind == "gqa" else 0
        return kernels.prefill_attention(a.kind, batch.tokens, context, heads, a.head_dim + a.v_head_dim, kv_heads)
    read = kv_elements(d.model, ranks) * BYTES[d.precision.kv]
    width = 2 * a.kv_rank + a.rope_dim if a.kind == "mla" else a.head_dim + a.v_head_dim
    return kernels.decode_attention(DecodeAttention(a.kind, batch.tokens, context, heads, read, 2.0 * width))


@lru_cache(maxsize=4096)
def _projections(model: ModelSpec, ranks: int) -> tuple[tuple[float, float], ...]:
    """(outputs, inputs) of attention's matrix multiplications on one rank.

    MLA in decode absorbs its up-projections into queries and outputs; as matrices they have the size of `kv_b`.
    """
    a, d = model.attention, model.d_model
    heads = -(-a.heads // ranks)
    out = (d, heads * a.v_head_dim)
    if a.kind == "gqa":
        kv = kv_elements(model, ranks)
        return (heads * a.head_dim + kv, d), out
    latent = a.kv_rank + a.rope_dim
    expand = (heads * (a.nope_dim + a.v_head_dim), a.kv_rank)
    if a.q_rank is None:
        return (heads * a.head_dim + latent, d), expand, out
    return (a.q_rank + latent, d), (heads * a.head_dim, a.q_rank), expand, out


def _feed_forward(
    d: Deployment, batch: Batch, width: int, matrices: int, kernels: Kernels, runtime: Runtime
) -> Estimate:
    """A dense feed-forward, cut over the attention group, whose tokens it sees."""
    cut, dtype = width / d.layout.attention_ranks, d.precision.linear
    up = kernels.matmul(batch.rows, (matrices - 1) * cut, d.model.d_model, dtype)
    return total((up, kernels.matmul(batch.rows, d.model.d_model, cut, dtype))).times(runtime["kernels"])


def way_of(d: Deployment, tokens: float, kernels: Kernels) -> Way:
    """Where our own engine's tokens go in a step of so many in an attention group."""
    replicated = tokens < kernels.replicates_below(d.layout.attention_ranks)
    return way(d.layout, kernels.cluster.gpus_per_node, replicated, d.replicas > 0)


def _exchange_parts(d: Deployment, batch: Batch, load: ExpertLoad, kernels: Kernels, runtime: Runtime) -> Parts:
    """How rows reach the experts: dispatch and combine, or replication and all-reduce, whichever is faster."""
    tp, width = d.layout.tp, d.model.d_model
    size = batch.tokens * width * 2
    if kernels.library == OWN_LIBRARY and way_of(d, batch.rows, kernels) != "across":
        return _own_exchange(d, batch, load, kernels, runtime)
    if d.layout.ep == 1:
        return {"expert exchange": kernels.collective("all_reduce", tp, size)}
    options = [_dispatched(d, batch, load, kernels, mode, runtime) for mode in _modes(d, kernels, batch)]
    if d.layout.attention_groups == 1:
        options.append({"expert exchange": kernels.collective("all_reduce", d.layout.stage_ranks, size)})
    return min(options, key=lambda parts: sum(part.value for part in parts.values()))


def _own_exchange(d: Deployment, batch: Batch, load: ExpertLoad, kernels: Kernels, runtime: Runtime) -> Parts:
    """Inside a node, by our own kernels (engine/dispatchers.py).

    Few tokens: every rank of an attention group has all of them, and a sum follows. If it is the whole stage, each rank
    does what its own experts have to do; otherwise, or with replicas, each expert group takes a slice and sends it off.
    More: each rank sends its own to all ranks of the groups that they chose, and gets their sums back.
    """
    layout, skew = d.layout, load.fullest if d.skew else 1.0
    replicated = layout.attention_ranks > 1 and batch.rows < kernels.replicates_below(layout.attention_ranks)
    stays = replicated and way_of(d, batch.rows, kernels) == "stays"
    ranks, tp = (1 if stays else layout.ep, 1) if replicated else (layout.stage_ranks, layout.tp)
    slices = 1 if stays else layout.attention_ranks // layout.tp if replicated else layout.attention_ranks
    tokens, parts = batch.tokens / slices, {}
    for phase, dtype in (("dispatch", d.precision.dispatch), ("combine", d.precision.combine)):
        mode = "local" if ranks == 1 else "pushed" if tokens <= PADDED_TOKENS else "ragged"
        shape = exchange_shape(d, batch, kernels, mode, dtype)
        laid_out = mode != "local" or lays_out(phase, tokens, shape.top_k, shape.experts)
        changes = {"ranks": ranks, "ranks_per_node": ranks, "tokens": tokens, "tp": tp, "laid_out": laid_out}
        shape = msgspec.structs.replace(shape, **changes)
        waiting = runtime["waiting"] if ranks > 1 else 1.0
        parts[phase] = kernels.exchange(shape, phase, skew).times(waiting)
    if replicated:
        parts["expert exchange"] = kernels.collective(
            "all_reduce", layout.attention_ranks, batch.tokens * d.model.d_model * 2
        )
    return parts


def _dispatched(d: Deployment, batch: Batch, load: ExpertLoad, kernels: Kernels, mode: Mode, runtime: Runtime) -> Parts:
    tp, width = d.layout.tp, d.model.d_model
    parts = {
        phase: kernels.exchange(
            exchange_shape(d, batch, kernels, mode, dtype), phase, load.fullest if d.skew else 1.0
        ).times(runtime["waiting"])
        for phase, dtype in (("dispatch", d.precision.dispatch), ("combine", d.precision.combine))
    }
    if tp > 1:
        gathered = load.received * width * 2
        rows = (kernels.collective(kind, tp, gathered) for kind in ("all_gather", "reduce_scatter"))
        parts["expert exchange"] = total(rows)
    return parts


def exchange_shape(d: Deployment, batch: Batch, kernels: Kernels, mode: Mode, dtype: str) -> ExchangeShape:
    """The exchange of one rank with its peers in the other expert groups."""
    router, cluster = d.model.router, kernels.cluster
    return ExchangeShape(
        mode=mode,
        ranks=d.layout.ep,
        ranks_per_node=max(1, min(d.layout.ep, cluster.gpus_per_node // d.layout.tp)),
        tokens=batch.tokens / d.layout.attention_ranks,
        share=batch.share,
        row_bytes=row_bytes(d.model.d_model, dtype),
        top_k=router.top_k,
        experts=d.model.experts,
        groups=router.groups,
        kept_groups=router.kept_groups,
        node_copies=d.node_copies,
        rank_copies=d.rank_copies,
    )


def _modes(d: Deployment, kernels: Kernels, batch: Batch) -> tuple[Mode, ...]:
    if d.mode is not None:
        return (d.mode,)
    if d.layout.ep * d.layout.tp <= kernels.cluster.gpus_per_node and kernels.cluster.gpus_per_node > 8:
        return ("two_sided",)
    padded = batch.tokens / d.layout.attention_ranks <= PADDED_TOKENS
    return ("low_latency", "normal") if padded else ("normal",)


def _fixed(seconds: float) -> Estimate:
    return Estimate(seconds, 0.3, "interpolated") if seconds else ZERO
