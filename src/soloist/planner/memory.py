"""Bytes on each GPU by part, before anything is started.

Weights and KV cache are exact for the runtime's own rules. Exchange buffers are those of the exchange that the layout
uses; activations are what was found alive at once in the largest step, workspace an upper estimate.
"""

from __future__ import annotations

from math import ceil

import msgspec

from soloist.planner.compute import BYTES
from soloist.planner.exchange import Mode, row_bytes
from soloist.planner.halves import Halves
from soloist.planner.precision import Precision
from soloist.planner.ways import way
from soloist.planner.weights import expert_slots, kv_elements, rank_weights
from soloist.specs.layout import Layout, Seat
from soloist.specs.model import ModelSpec, Spec

CONTEXT_BYTES = 0.6e9  # CUDA context and loaded kernels
NCCL_BYTES = 0.4e9  # communicators' own buffers, where there are any
RESIDUALS = 6  # tensors as large as the residual stream that were found alive at once
LIBRARY_BYTES = 50e6  # that cuBLAS and the sampler keep
GEMM_WORKSPACE_BYTES = 32e6 * 2
RECEIVED, SENT = 2, 5  # messages of a pipeline that a stage holds: 4 that may be under way, and the one being sent
PUSHED_BYTES, FEWEST_PUSHED = 6e9, 512  # of a pushed call's expanded rows on a rank; tokens that go whatever they take
# Tokens of a step below which all ranks of an attention group have all of them instead of a share: usually, and where
# our own kernels sum. Inside a node of GPUs a one-shot sum of 256 rows of 4096 in bf16 sends 2 MB to each peer, 6–8 µs
# by arithmetic at 300 GB/s. The sharded form has a gather and a reduce-scatter instead, 17 + 15 µs by NCCL: replicate
# in all captured decoding steps up to 256.
REPLICATED, REPLICATED_NVLINK = 64, 257
KV_BLOCK = 64  # tokens of a KV block on a GPU


def replicates_below(is_gpu: bool, nvlink_sums: bool, gpus_per_node: int, attention_ranks: int) -> int:
    """The one of the two that our engine takes; its kernels sum where attention groups lie inside nodes."""
    sums = is_gpu and nvlink_sums and gpus_per_node % attention_ranks == 0
    return REPLICATED_NVLINK if sums else REPLICATED


class MemoryLoad(Spec, frozen=True, kw_only=True):
    """The largest that an attention group has to hold at once."""

    sequences: float  # in decode
    longest: int  # tokens of a sequence at its end
    step_tokens: int = 2048  # tokens of the largest step (prefill chunk)
    exchange_tokens: int = 128  # tokens of a rank that the decode exchange's buffers hold
    spare_slots: int = 0
    block: int = KV_BLOCK
    replicated: int = REPLICATED_NVLINK  # tokens of a step below which all ranks of an attention group have them all
    halves: Halves = Halves()  # steps that go as two of them
    graph_rows: float = 0.0  # of the largest captured decoding step; 0: as many as sequences
    captured: int = 0  # tokens of the largest prefill step in a graph, whose activations stay with it
    eager: int | None = None  # tokens of the largest prefill step without a graph; None: step_tokens


def memory_parts(
    spec: ModelSpec,
    seat: Seat,
    precision: Precision,
    load: MemoryLoad,
    mode: Mode = "ragged",
    slots: int = 0,
) -> dict[str, float]:
    """Bytes by part on the rank at `seat`. `slots`: of its expert group; 0: as many as hold every expert once."""
    layout = seat.layout
    held = expert_slots(spec, layout, slots) + load.spare_slots
    return {
        **rank_weights(spec, seat, held, precision),
        "KV cache": kv_bytes(spec, seat, precision, load),
        "exchange buffers": exchange_bytes(spec, layout, precision, load, mode, held),
        "activations": _activations(spec, seat, load, mode, held, precision.experts_on(spec, layout.tp)),
        "workspace": CONTEXT_BYTES + GEMM_WORKSPACE_BYTES + (NCCL_BYTES if layout.size > 1 else 0.0),
    }


def worst_rank(
    spec: ModelSpec, layout: Layout, precision: Precision, load: MemoryLoad, mode: Mode = "ragged", slots: int = 0
) -> dict[str, float]:
    """Parts of the fullest rank: the first of its groups on the first or the last stage."""
    seats = dict.fromkeys((layout.at(0), layout.at((layout.pp - 1) * layout.stage_ranks)))  # one, of one stage
    tables = [memory_parts(spec, seat, precision, load, mode, slots) for seat in seats]
    return max(tables, key=lambda parts: sum(parts.values()))


def kv_bytes(spec: ModelSpec, seat: Seat, precision: Precision, load: MemoryLoad) -> float:
    """KV cache of this rank's layers for its group's sequences, in whole blocks, and the block that padding writes to.

    Layers with a window keep all.
    """
    tokens = load.sequences * _blocks(load.longest, load.block) + load.block
    each = kv_elements(spec, seat.layout.attention_ranks, seat.attention_index) * BYTES[precision.kv]
    layers = seat.layout.stage_layers(seat.stage, spec.layers)
    return each * len(layers) * tokens


def exchange_bytes(
    spec: ModelSpec, layout: Layout, precision: Precision, load: MemoryLoad, mode: Mode, slots: int
) -> float:
    """Send and receive buffers of dispatch and combine on one rank.

    Low latency: room for every token of every rank at each local slot, twice (double buffering), as DeepEP reserves.
    Pushed: the windows and the index of Soloist's one-sided exchange (dispatch/lane.py). The others: rows that arrive
    when each rank's step is full, twice, both ways; none where there is one expert group.
    """
    if mode == "pushed":
        return window_bytes(spec, layout, precision, load, slots)
    if layout.ep == 1:
        return 0.0
    there, back = row_bytes(spec.d_model, precision.dispatch), row_bytes(spec.d_model, precision.combine)
    if mode == "low_latency":
        return 2 * slots * layout.ep * load.exchange_tokens * (there + back)
    own = -(-load.step_tokens // layout.attention_ranks)
    received = own * min(layout.ep, spec.router.top_k) * 1.25
    return 2 * (own + received) * (there + back)


def pushed_tokens(spec: ModelSpec, layout: Layout, tokens: int, itemsize: float) -> int:
    """Of `tokens` that each rank brings to a step, how many go in one call of the pushed exchange; the others follow.

    A call has room for every token of every rank at each of its choices, before, between and behind the two products
    of the experts. Most of it stays empty, but a KV cache of 90 % of the memory must leave that much.
    """
    each = spec.router.top_k * (2 * spec.d_model + -(-spec.expert.width // layout.tp)) * itemsize
    return min(tokens, max(FEWEST_PUSHED, int(PUSHED_BYTES / (layout.stage_ranks * each))))


def window_bytes(spec: ModelSpec, layout: Layout, precision: Precision, load: MemoryLoad, slots: int) -> float:
    """A window has room for every token that any rank could send: rows there, results of the experts, rows home.

    Beside it lie choices and weights, and the index of expanded rows. Where any steps go as two halves there are two of
    them, each for the most tokens that go at once: halves, or whole steps of those that are not cut. Attention groups
    of several ranks have one more for steps of few tokens, which all of their ranks have. Where these tokens need not
    travel (one expert group, or one attention group and no replicas), there is an index (dispatch/local.py) instead; a
    GPU by itself has only that.
    """
    top_k, size = spec.router.top_k, BYTES[precision.combine]

    def window(ranks: int, capacity: int) -> float:
        rows, most = ranks * capacity, min(top_k, max(slots, 1))
        row = spec.d_model * (row_bytes(1, precision.dispatch) + 2 * size) + 4 + 8 * top_k
        return rows * (row + 12 * most + 4 * top_k)

    attention, lanes = layout.attention_ranks, 2 if load.halves else 1
    most = load.halves.largest(load.step_tokens, ceil(load.sequences))
    pushed = pushed_tokens(spec, layout, -(-most // attention), size)
    found = lanes * window(layout.stage_ranks, pushed) if layout.stage_ranks > 1 else 0.0
    if way(layout, layout.size, replicated=True, repeats=slots > expert_slots(spec, layout)) == "stays":
        tokens = load.step_tokens if layout.ep == 1 else min(load.step_tokens, load.replicated)
        return found + 12 * tokens * min(top_k, max(slots, 1)) + 4 * (tokens * top_k + slots)
    if attention > 1:
        few = min(load.step_tokens, load.replicated)
        found += window(layout.ep, -(-few * layout.tp // attention))
    return found


def _activations(spec: ModelSpec, seat: Seat, load: MemoryLoad, mode: Mode, slots: int, experts: str) -> float:
    """Of the largest step without a graph and of the largest with one, which are kept apart; messages, logits."""
    eager = load.step_tokens if load.eager is None else load.eager
    steps = (msgspec.structs.replace(load, step_tokens=tokens) for tokens in (eager, load.captured) if tokens)
    live = sum(activation_bytes(spec, seat.layout, step, mode, slots, experts) for step in steps)
    logits = _logits(spec, seat.layout, load) if seat.is_last_stage else 0.0
    return live + _message_bytes(spec, seat, load) + logits + LIBRARY_BYTES


def _message_bytes(spec: ModelSpec, seat: Seat, load: MemoryLoad) -> float:
    """Of a pipeline: a message that came and where graphs read it; copies of those that left (transport/nccl.py)."""
    each = 2 * -(-load.step_tokens // seat.layout.attention_ranks) * spec.d_model
    return each * ((0 if seat.is_first_stage else RECEIVED) + (0 if seat.is_last_stage else SENT))


def activation_bytes(
    spec: ModelSpec, layout: Layout, load: MemoryLoad, mode: Mode, slots: int, experts: str = "bf16"
) -> float:
    """Live tensors of the largest step: residual stream, queries, keys and values, expert rows.

    Our own exchange makes room for every row that could come, and its experts keep the hidden rows alone; others keep
    what comes, with a margin, and every matrix's result. `experts`: their data type. Those in fp8 have their rows and
    hidden rows in fp8, too, the latter beside the 16 bits that they are made from (kernels/experts.py: Fp8Experts).
    """
    a, tokens, d = spec.attention, load.step_tokens, spec.d_model
    own = -(-tokens // layout.attention_ranks)
    heads = -(-a.heads // layout.attention_ranks) * (a.head_dim + a.v_head_dim)
    width, top_k = -(-spec.expert.width // layout.tp), spec.router.top_k
    pairs, wide = own * top_k * 1.25, spec.expert.matrices
    if mode == "pushed":
        call = pushed_tokens(spec, layout, own, BYTES["bf16"]) if layout.stage_ranks > 1 else own
        pairs, wide = layout.stage_ranks * call * min(top_k, max(slots, 1)), 1
    attention = 2 * tokens * (2 * heads + 2 * d)
    quantised = BYTES["fp8"] if experts == "fp8" else 0.0
    rows = pairs * (2 * d + (quantised or 2) * d + (2 + quantised) * wide * width)
    return RESIDUALS * 2 * own * d + max(attention, rows)


def _logits(spec: ModelSpec, layout: Layout, load: MemoryLoad) -> float:
    """In 16 bits, of the largest captured step; where ranks share the vocabulary, their part of it beside it."""
    parts = 1 + (1 / layout.attention_ranks if layout.attention_ranks > 1 else 0)
    return 2 * spec.vocab * (load.graph_rows or load.sequences) * parts


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
