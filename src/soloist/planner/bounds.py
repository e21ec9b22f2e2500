"""What the hardware allows at best: datasheet peaks, nothing but the work itself, perfect overlap and balance."""

from __future__ import annotations

from soloist.planner.compute import BYTES
from soloist.planner.exchange import copies
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Batch, Deployment, exchange_shape, expert_load
from soloist.planner.weights import kv_elements, layer_weights, rank_weights
from soloist.specs.model import ModelSpec


def flops_per_token(model: ModelSpec, context: float) -> float:
    """Arithmetic of one token that sees `context` tokens: its experts, attention, output head excluded."""
    a, k = model.attention, model.router.top_k
    elements = sum(
        w.by_query + w.by_kv + w.replicated + w.dense + w.shared + w.router + k * w.expert for w in layer_weights(model)
    )
    core = context * a.heads * (a.head_dim + a.v_head_dim) * model.layers
    return 2 * (elements + core)


def prefill_rate(d: Deployment, kernels: Kernels, context: float) -> float:
    """Most prompt tokens/s of the deployment: arithmetic at peak, or the NICs at line rate."""
    gpu = kernels.cluster.gpu
    arithmetic = d.layout.size * gpu.flops(d.precision.experts) / flops_per_token(d.model, context)
    crossing = nic_bytes_per_token(d, kernels)
    return min(arithmetic, d.layout.size * kernels.cluster.nic / crossing) if crossing else arithmetic


def nic_bytes_per_token(d: Deployment, kernels: Kernels) -> float:
    """Bytes that one prompt token sends across nodes in all layers, dispatch and combine, deduplicated by node."""
    if d.layout.ep == 1:
        return 0.0
    batch, layers = Batch("prefill", 1.0, 1.0), len(d.model.moe_layers)
    phases = (d.precision.dispatch, d.precision.combine)
    shapes = (exchange_shape(d, batch, kernels, "normal", dtype) for dtype in phases)
    return layers * sum(copies(shape).nic * shape.row_bytes for shape in shapes)


def decode_seconds(d: Deployment, kernels: Kernels, sequences: float, context: float) -> float:
    """Least time of a decode step of `sequences` an attention group: reading weights that are touched, and KV."""
    layout, gpu = d.layout, kernels.cluster.gpu
    flights = layout.pp
    batch = Batch("decode", sequences / flights, context)
    weights = rank_weights(d.model, layout.at(0), expert_load(d, batch).active, d.precision)
    kv = kv_elements(d.model, layout.attention_ranks) * BYTES[d.precision.kv] * context * batch.tokens
    layers = len(layout.stage_layers(0, d.model.layers))
    moved = sum(weights.values()) - weights["embedding and head"] / 2 + kv * layers
    return flights * moved / gpu.bandwidth
