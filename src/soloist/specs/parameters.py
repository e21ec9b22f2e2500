"""Every weight that a `ModelSpec` implies: its name, layer, expert and full shape.

One list for all who need it: the loader (what to read, what is missing or left over), random initialisation, and the
planner's memory table. Linear weights are `[out, in]`. The names are Soloist's own; `models/families.py` maps them to
the names of each checkpoint family.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from soloist.specs.model import ModelSpec


class Param(NamedTuple):
    """Key of one weight. `layer` is -1 outside the layers, `expert` -1 outside the experts."""

    name: str
    layer: int = -1
    expert: int = -1

    def __str__(self) -> str:
        where = "" if self.layer < 0 else f"layer {self.layer} "
        return where + ("" if self.expert < 0 else f"expert {self.expert} ") + self.name


Shape = tuple[int, ...]


def parameters(spec: ModelSpec, experts: int | None = None) -> Iterator[tuple[Param, Shape]]:
    """All weights of the model, in reading order; of every layer's experts, which are alike, the first `experts`."""
    yield Param("embed"), (spec.vocab, spec.d_model)
    for layer in range(spec.layers):
        for name, shape in _attention(spec):
            yield Param(name, layer), shape
        yield Param("mlp_norm", layer), (spec.d_model,)
        yield from _dense(spec, layer) if layer in spec.dense_layers else _moe(spec, layer, experts)
    yield Param("final_norm"), (spec.d_model,)
    if not spec.tied:
        yield Param("lm_head"), (spec.vocab, spec.d_model)


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    a, d = spec.attention, spec.d_model
    yield "attn_norm", (d,)
    q, k, v = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.v_head_dim
    if a.kind == "mla":
        yield from _latent(spec)
    else:
        yield from (("q", (q, d)), ("k", (k, d)), ("v", (v, d)))
        if a.bias:
            yield from (("q_bias", (q,)), ("k_bias", (k,)), ("v_bias", (v,)))
        if a.qk_norm == "head":
            yield from (("q_norm", (a.head_dim,)), ("k_norm", (a.head_dim,)))
        if a.qk_norm == "full":
            yield from (("q_norm", (q,)), ("k_norm", (k,)))
        if a.sinks:
            yield "sinks", (a.heads,)
    yield "o", (d, a.heads * a.v_head_dim)
    if a.out_bias:
        yield "o_bias", (d,)


def _latent(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    a, d = spec.attention, spec.d_model
    q = a.heads * a.head_dim
    if a.q_rank is None:
        yield "q", (q, d)
    else:
        yield from (("q_a", (a.q_rank, d)), ("q_a_norm", (a.q_rank,)), ("q_b", (q, a.q_rank)))
        if a.bias:
            yield "q_a_bias", (a.q_rank,)
    yield from (("kv_a", (a.kv_rank + a.rope_dim, d)), ("kv_a_norm", (a.kv_rank,)))
    if a.bias:
        yield "kv_a_bias", (a.kv_rank + a.rope_dim,)
    yield "kv_b", (a.heads * (a.nope_dim + a.v_head_dim), a.kv_rank)


def _dense(spec: ModelSpec, layer: int) -> Iterator[tuple[Param, Shape]]:
    for name, shape in _feed_forward(spec.dense_width, spec.d_model, gated=spec.expert.kind != "mlp"):
        yield Param(f"dense_{name}", layer), shape


def _moe(spec: ModelSpec, layer: int, experts: int | None) -> Iterator[tuple[Param, Shape]]:
    d, e, f = spec.d_model, spec.experts, spec.expert.width
    yield Param("router", layer), (e, d)
    if spec.router.bias:
        yield Param("router_bias", layer), (e,)
    if spec.router.correction_bias:
        yield Param("correction_bias", layer), (e,)
    if spec.shared_width:
        for name, shape in _feed_forward(spec.shared_width, d, gated=spec.expert.kind != "mlp"):
            yield Param(f"shared_{name}", layer), shape
        if spec.shared_gate:
            yield Param("shared_expert_gate", layer), (1, d)
    gated = spec.expert.kind != "mlp"
    for expert in range(e if experts is None else experts):
        for name, shape in _feed_forward(f, d, gated):
            yield Param(name, layer, expert), shape
        if spec.expert.bias:
            for name, width in (("gate_bias", f), ("up_bias", f), ("down_bias", d)):
                if gated or name != "gate_bias":
                    yield Param(name, layer, expert), (width,)


def _feed_forward(width: int, d_model: int, gated: bool) -> Iterator[tuple[str, Shape]]:
    if gated:
        yield "gate", (width, d_model)
    yield "up", (width, d_model)
    yield "down", (d_model, width)
