"""What calibrates the small kernels of a layer: norms with residuals, heads into the cache, router and slots; and what
their launches take of the host.

In decode they are a third of a layer of narrow experts, so they are measured as they are, one after the other.

Shape legend: T tokens, D model width, E experts, N columns of queries, keys and values side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter

import torch

from soloist.kernels.language import AVAILABLE
from soloist.kernels.norm import fused_heads
from soloist.models.layers import add_norm
from soloist.moe.choice import Chooser
from soloist.moe.router import Router, SlotTable
from soloist.placement.placement import Placement
from soloist.probes import device as probe
from soloist.probes.records import Record
from soloist.specs.model import RouterSpec

EPS = 1e-6
LAUNCHES = 5  # norm, heads, norm, the router's product and its choice
AT_A_TIME, REPEATS = 20, 9  # layers that fit into a GPU's queue; the median of so many


@dataclass(frozen=True)
class LayerShape:
    """Of one rank. `heads` query heads and `kv_heads` of `head_dim`; `normed`: these are normed one by one, too."""

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    normed: bool = False

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    "cuda": [LayerShape(4096, 32, 32, 128, 16, 2), LayerShape(4096, 32, 8, 128, 64, 4),
             LayerShape(2048, 32, 4, 128, 128, 8, normed=True), LayerShape(2048, 16, 2, 128, 128, 8, normed=True)],
    "cpu": [LayerShape(256, 4, 2, 32, 16, 2)],
}  # fmt: skip
TOKENS = {"cuda": [1, 16, 64, 128, 512, 2048, 8192], "cpu": [1, 16, 256]}


def small_kernels(device: torch.device, dtype: torch.dtype, gpu: str) -> Iterator[Record]:
    """All of a layer's, in the forms that the engine uses on this device."""
    for shape, tokens in product(SHAPES[device.type], TOKENS[device.type]):
        with_heads = AVAILABLE and device.type == "cuda"
        columns = {
            "gpu": gpu, "tokens": tokens, "hidden": shape.d_model, "columns": shape.columns if with_heads else 0,
            "experts": shape.experts, "top_k": shape.top_k,
        }  # fmt: skip
        yield Record("small", columns, probe.seconds(_layer(shape, tokens, device, dtype, with_heads), device))


def launches(device: torch.device, dtype: torch.dtype, gpu: str) -> Iterator[Record]:
    """What the host takes to start one of these kernels, of which few at a time wait on a GPU."""
    layer = _layer(SHAPES[device.type][0], TOKENS[device.type][1], device, dtype, device.type == "cuda")

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        for _ in range(AT_A_TIME):
            layer()
        return (perf_counter() - start) / (AT_A_TIME * LAUNCHES)

    seconds()
    yield Record("host", {"gpu": gpu, "kernels": LAUNCHES}, median(seconds() for _ in range(REPEATS)))


def _layer(
    shape: LayerShape, tokens: int, device: torch.device, dtype: torch.dtype, with_heads: bool
) -> Callable[[], None]:
    """Norm, heads, norm, router; the residual stream goes from one norm to the next."""

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x_TD, added_TD, weight_D = drawn(tokens, shape.d_model), drawn(tokens, shape.d_model), drawn(shape.d_model)
    qkv_TN, norm_Q = drawn(tokens, shape.columns), drawn(shape.head_dim)
    angles = drawn(tokens, 1, shape.head_dim // 2)
    cache = torch.zeros(tokens, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
    slots_T = torch.randperm(tokens).to(device)
    norms = (norm_Q, norm_Q) if shape.normed else None
    router = Router(RouterSpec(top_k=shape.top_k), drawn(shape.experts, shape.d_model))
    placement = Placement(experts=shape.experts, slots=((tuple(range(shape.experts)),),))
    choose = Chooser(router, SlotTable(placement, 0, 0, device))

    def layer() -> None:
        sum_TD, _ = add_norm(x_TD, added_TD, weight_D, EPS)
        if with_heads:
            fused_heads(qkv_TN, norms, EPS, angles, angles, False, slots_T, cache, cache)
        _, h_TD = add_norm(sum_TD, added_TD, weight_D, EPS)
        choose(h_TD)

    return layer
