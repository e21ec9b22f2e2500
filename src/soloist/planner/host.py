"""What the host adds to a step whose kernels it starts one by one, as our own engine does with prefill.

    host = layers · launches of a layer · (launch + python) · slowest(ranks)

A launch is what Triton and CUDA take, measured by `soloist calibrate`; python is our engine's own code around it. The
step takes as long as its host or its GPU, whichever is slower. Hosts wait for nobody within a step, but GPUs wait for
each other in every layer, so the slowest host of all ranks counts: the expected maximum of normal variates. A step that
a graph holds has one launch, and nothing is added. No graph holds steps whose tokens cross nodes (`ways`).

Launches were counted in profiles of a prefill layer by torch's profiler, 8192 tokens of Qwen3-30B-A3B's shape: 13 in
ep1, 23 in ep2, 23 and two of NCCL's collectives in tp2.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from soloist.errors import ConfigurationError
from soloist.planner.bounds import flops_per_token
from soloist.planner.memory import MemoryLoad, activation_bytes
from soloist.planner.precision import Precision
from soloist.planner.routing import highest
from soloist.planner.weights import expert_slots
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

KERNELS = 13  # norms 2, projections 2, heads, attention, router's product and choice, index, rows, experts 2, sum
TRAVELLING = 10  # flags, counts, pushes and copies between GPUs
# 101 of torch's operations, 6 calls of NCCL, waiting for counts: between two declared nodes a layer of decode took
# 3.65 ms where one inside a node took 1.11 ms, 23 launches (docs/planner.md).
CROSSING = 62
LATENT, SHARED = 4, 5  # more of MLA's projections and norms; of shared experts: read off the code, not profiled
COLLECTIVE = 3  # launches that a call of NCCL is worth: 330 µs with torch's bookkeeping, 250 to 420 in the profile
SPREAD = 0.13  # of hosts: in the profiles one rank waited for the other for 3, 10, 20 and 41 % of a layer
# Of the engine's graphs, too (engine/graphs.py).
WASTE, FEW = 1.5, 1024  # tokens of a prefill step's bucket over its own; up to FEW of them the host is what takes long
SHORT_CONTEXT = 4096  # tokens: what a program of the attention takes without a split
SIZES = (64, 128, 256, 512, 1024)  # of steps in graphs: with so few tokens the host takes longer
THIN_FLOPS = 2e12  # of a layer on one GPU: some 3 ms, which is what the host takes to start it with an exchange
KEPT_BYTES = 2e9  # of a step's activations, for it to have a graph: they stay with it


def launches(model: ModelSpec, layout: Layout, crosses: bool = False) -> int:
    """Of a layer with experts, on one rank; calls of NCCL by what they are worth. `crosses`: tokens leave the node."""
    found = KERNELS + (LATENT if model.attention.kind == "mla" else 0) + (SHARED if model.shared_width else 0)
    if layout.stage_ranks > 1:
        found += CROSSING if crosses else TRAVELLING
    if layout.attention_ranks > 1:  # tokens are gathered before attention, and sums scattered after it
        found += 2 * COLLECTIVE
    return found


def slowest(ranks: int) -> float:
    """Expected time of the slowest of as many hosts over the mean one's."""
    return 1 + SPREAD * highest(ranks)


def bucket_of(buckets: Sequence[int], tokens: float) -> int | None:
    """The least of the ascending `buckets` that holds a prefill step, None where it would be mostly padding."""
    at = bisect_left(buckets, tokens)
    return buckets[at] if at < len(buckets) and buckets[at] <= max(FEW, WASTE * tokens) else None


def sizes(model: ModelSpec, layout: Layout, most: int, keep_fp8: bool = True) -> tuple[int, ...]:
    """Ascending tokens of the steps that the engine holds in graphs where that is left to it (`mixed_graphs=auto`).

    Up to FEW tokens, and above where layers are thin: then up to `most`, each size WASTE times the one below at most.
    Only while activations do not take too much memory.
    """
    flops = flops_per_token(model, 0) / model.layers / layout.attention_ranks
    steps = math.ceil(math.log(max(most / FEW, 1.0), WASTE))
    larger = [FEW * (most / FEW) ** (step / steps) for step in range(1, steps + 1)]
    found = [tokens for tokens in SIZES if tokens <= most]
    found += [min(most, -(-int(size) // 64) * 64) for size in larger if size * flops <= THIN_FLOPS]
    return tuple(tokens for tokens in found if _kept(model, layout, tokens, keep_fp8) <= KEPT_BYTES)


def _kept(model: ModelSpec, layout: Layout, tokens: int, keep_fp8: bool) -> float:
    """Bytes of the activations of a step."""
    load = MemoryLoad(sequences=1, longest=1, step_tokens=tokens, graph_rows=1)
    experts = Precision.of(model, keep_fp8=keep_fp8).experts_on(model, layout.tp)
    return activation_bytes(model, layout, load, "pushed", expert_slots(model, layout, 0), experts)


def buckets_of(text: str, model: ModelSpec, layout: Layout, most: int, keep_fp8: bool = True) -> tuple[int, ...]:
    """Ascending, up to `most` tokens, from the engine's option `mixed_graphs`: `auto` (see `sizes`), `off`, or tokens
    like `256,8192`. Raises ConfigurationError for other texts."""
    if text == "auto":
        return sizes(model, layout, most, keep_fp8)
    return tuple(tokens for tokens in stated(text) if tokens <= most)


def stated(text: str) -> tuple[int, ...]:
    """The tokens that a text like `256,8192` names, ascending; none of `auto` and `off`."""
    if text in ("auto", "off"):
        return ()
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 1 for part in parts):
        raise ConfigurationError.of("mixed_graphs", text, "must be auto, off, or tokens of steps like 256,8192")
    return tuple(sorted({int(part) for part in parts}))


def largest_eager(buckets: Sequence[int], most: int, longest: float) -> int:
    """Tokens of the largest prefill step without a graph, sequences having up to `longest` tokens; 0: there is none."""
    if longest > SHORT_CONTEXT:
        return most
    gaps = (math.ceil(bucket / WASTE) for bucket in buckets if bucket > FEW)  # the smallest step in it
    return max((size - 1 for size in (*gaps, most + 1) if size > 1 and bucket_of(buckets, size - 1) is None), default=0)
