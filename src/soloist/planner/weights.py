"""How many weights of each part a rank holds, and how large they are: sums over `specs/parameters.py`.

The rules of the cut are the decoder's: heads over the attention group, dense and shared widths and the vocabulary too,
an expert's width over its `tp` ranks, router and norms on every rank.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from soloist.planner.compute import BYTES
from soloist.planner.precision import Precision
from soloist.specs.layout import Layout, Seat, share
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import parameters

BY_QUERY_HEAD = {"q", "q_b", "kv_b", "o", "q_bias", "sinks"}
BY_KV_HEAD = {"k", "v", "k_bias", "v_bias"}
SCALE_BYTES = 4 / 128**2  # of an fp8 weight: a number in fp32 for each block
PARTS = ("attention", "experts", "shared experts", "dense layers", "router", "embedding and head")


class LayerWeights(NamedTuple):
    """Elements of one layer by how they are cut."""

    by_query: float
    by_kv: float
    replicated: float  # of attention and norms
    out_bias: float  # of attention, added by the first rank of its group
    dense: float  # cut over the attention group
    shared: float  # cut over the attention group
    router: float
    expert: float  # of one expert
    down_bias: float  # of one expert, added by the first rank of its group


@lru_cache(maxsize=64)
def layer_weights(spec: ModelSpec) -> tuple[LayerWeights, ...]:
    """Elements of every layer."""
    sums = [dict.fromkeys(LayerWeights._fields, 0.0) for _ in range(spec.layers)]
    for param, shape in parameters(spec, experts=1):
        if param.layer >= 0:
            sums[param.layer][_cut(param.name, param.expert, spec)] += prod(shape)
    return tuple(LayerWeights(**layer) for layer in sums)


@lru_cache(maxsize=1024)
def _stage_weights(spec: ModelSpec, layers: range) -> LayerWeights:
    """Sums over the layers of a stage."""
    table = layer_weights(spec)
    return LayerWeights(*(sum(column) for column in zip(*(table[i] for i in layers), strict=True)))


def _cut(name: str, expert: int, spec: ModelSpec) -> str:
    norms = spec.attention.qk_norm == "full"  # over all heads of a token, so each has its part
    if expert == 0:
        return "down_bias" if name == "down_bias" else "expert"
    if name == "o_bias":
        return "out_bias"
    if name in BY_QUERY_HEAD or (norms and name == "q_norm"):
        return "by_query"
    if name in BY_KV_HEAD or (norms and name == "k_norm"):
        return "by_kv"
    if name.startswith("dense_"):
        return "dense"
    if name.startswith("shared_") and name != "shared_expert_gate":
        return "shared"
    return "router" if name in ("router", "router_bias", "correction_bias", "shared_expert_gate") else "replicated"


def held_kv_heads(spec: ModelSpec, ranks: int, index: int = 0) -> int:
    """KV heads that one rank of an attention group holds; a head that serves several ranks is held by each."""
    start, stop = share(spec.attention.heads, ranks, index)
    each = spec.attention.heads // spec.attention.kv_heads
    return -(-stop // each) - start // each if stop > start else 0


def kv_elements(spec: ModelSpec, ranks: int, index: int = 0) -> int:
    """KV cache elements a token and layer on one rank; the latent row of MLA is held by all."""
    a = spec.attention
    return a.kv_elements if a.kind == "mla" else held_kv_heads(spec, ranks, index) * (a.head_dim + a.v_head_dim)


def rank_weights(spec: ModelSpec, seat: Seat, slots: float, precision: Precision) -> dict[str, float]:
    """Bytes of weights on one rank by part. `slots`: expert slots of its group in each MoE layer."""
    layout, index, ranks = seat.layout, seat.attention_index, seat.layout.attention_ranks
    heads = _part(spec.attention.heads, ranks, index)
    kv = held_kv_heads(spec, ranks, index) / spec.attention.kv_heads
    width = _part(spec.expert.width, layout.tp, seat.tp_index)
    linear, other = BYTES[precision.linear], BYTES[precision.other]
    experts = BYTES[kind := precision.experts_on(spec, layout.tp, seat.tp_index)]
    if kind == "fp8" and spec.fp8_experts:
        experts += SCALE_BYTES
    x = _stage_weights(spec, layout.stage_layers(seat.stage, spec.layers))
    return {
        "attention": (x.by_query * heads + x.by_kv * kv + x.replicated + (x.out_bias if index == 0 else 0)) * linear,
        "experts": (x.expert * width + (x.down_bias if seat.tp_index == 0 else 0)) * slots * experts,
        "shared experts": x.shared * _part(spec.shared_width, ranks, index) * linear,
        "dense layers": x.dense * _part(spec.dense_width, ranks, index) * linear,
        "router": x.router * other,
        "embedding and head": (_vocabulary(spec, seat) + seat.is_last_stage) * spec.d_model * other,
    }


def _vocabulary(spec: ModelSpec, seat: Seat) -> float:
    """Rows of embedding and output head that this rank holds."""
    start, stop = share(spec.vocab, seat.layout.attention_ranks, seat.attention_index)
    head = seat.is_last_stage and not (spec.tied and seat.is_first_stage)
    return (stop - start) * (seat.is_first_stage + head)


def _part(total: int, parts: int, index: int) -> float:
    """The share of one rank; of nothing there is none."""
    start, stop = share(total, parts, index)
    return (stop - start) / total if total else 0.0


def expert_slots(spec: ModelSpec, layout: Layout, slots_per_group: int = 0) -> int:
    """Slots of the fullest expert group in each MoE layer: what is asked for, at least enough for every expert."""
    return max(slots_per_group, -(-spec.experts // layout.ep))
