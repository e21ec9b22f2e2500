"""How evenly the experts are loaded: counters that cost next to nothing and are read when somebody asks.

Shape legend: E experts, T tokens, K top-k, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.kernels.count import count_choices
from soloist.kernels.language import AVAILABLE
from soloist.moe.recorder import RoutingRecorder
from soloist.moe.router import Routing


@dataclass
class LayerLoad:
    """What one rank saw of one layer since it was last asked."""

    tokens_E: Tensor  # int64: choices of each logical expert by the tokens that this rank routed
    rows: int  # rows that arrived for this rank's experts


class LoadStats:
    """Counters of all MoE layers of a rank. Recording stays on the device and waits for nothing.

    A layer's counters are made at its first call and live as long as this object, so that a CUDA graph that was
    captured later goes on counting when it is replayed. They only grow: each reader keeps what it has seen.
    """

    def __init__(self, experts: int, enabled: bool = False, recorder: RoutingRecorder | None = None) -> None:
        """`recorder` gets every routing, whether counting is enabled or not."""
        self.experts, self.enabled, self.recorder = experts, enabled, recorder
        self._counts: dict[int, Tensor] = {}  # E + 1: choices, then rows
        self._own = self.reader()

    def record(self, layer: int, routing: Routing, batch: ExpertBatch, live_T: Tensor | None = None) -> None:
        """Count one pass through a layer, if enabled; tokens that are not live do not count."""
        if self.recorder:
            self.recorder.record(layer, routing.expert_ids_TK)
        if not self.enabled:
            return
        ids_TK = routing.expert_ids_TK
        if layer not in self._counts:
            self._counts[layer] = ids_TK.new_zeros(self.experts + 1)
        counts = self._counts[layer]
        if AVAILABLE and ids_TK.is_cuda and batch.slots_RK is not None:
            count_choices(ids_TK.contiguous(), live_T, batch.slots_RK, counts)
            return
        live_TK = torch.ones_like(ids_TK) if live_T is None else live_T[:, None].expand_as(ids_TK).to(ids_TK.dtype)
        counts.index_add_(0, ids_TK.flatten(), live_TK.flatten())
        counts[-1] += len(batch.rows_RD) if batch.dense else _rows_named(batch)

    def forget(self) -> None:
        """What was counted so far belongs to no request. Before anybody has read it."""
        for counts in self._counts.values():
            counts.zero_()

    def reader(self) -> LoadReader:
        return LoadReader(self._counts)

    def take(self) -> dict[int, LayerLoad]:
        """The counters of each layer since the last call."""
        return self._own.take()


@dataclass
class LoadReader:
    """Reads counters that grow; several readers do not disturb each other."""

    counts: dict[int, Tensor]
    seen: dict[int, Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def take(self) -> dict[int, LayerLoad]:
        """The counters of each layer since this reader's last call."""
        now = {layer: counts.clone() for layer, counts in self.counts.items()}
        new = {layer: counts - self.seen[layer] if layer in self.seen else counts for layer, counts in now.items()}
        self.seen = now
        return {layer: LayerLoad(counts[:-1], int(counts[-1])) for layer, counts in new.items()}


def _rows_named(batch: ExpertBatch) -> Tensor:
    """How many rows the index names: those that came."""
    used_X = torch.arange(len(batch.row_X), device=batch.row_X.device) < batch.offsets_S[-1]
    named_R = torch.zeros(len(batch.rows_RD) + 1, dtype=torch.int64, device=batch.row_X.device)
    named_R[batch.row_X.where(used_X, len(batch.rows_RD))] = 1
    return named_R[:-1].sum()


def imbalance(load_N: Tensor) -> float:
    """The largest load over the mean: 1 is even. 1 for no load at all."""
    mean = load_N.double().mean().item()
    return load_N.max().item() / mean if mean else 1.0
