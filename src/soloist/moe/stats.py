"""How evenly the experts are loaded: counters that cost next to nothing and are read when somebody asks.

Shape legend: E experts, T tokens, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.moe.recorder import RoutingRecorder
from soloist.moe.router import Routing


@dataclass
class LayerLoad:
    """What one rank saw of one layer since the counters were last taken."""

    tokens_E: Tensor  # int64: choices of each logical expert by the tokens that this rank routed
    rows: int = 0  # rows that arrived for this rank's experts


class LoadStats:
    """Counters of all MoE layers of a rank. Recording stays on the device and waits for nothing."""

    def __init__(self, experts: int, enabled: bool = False, recorder: RoutingRecorder | None = None) -> None:
        """`recorder` gets every routing, whether counting is enabled or not."""
        self.experts, self.enabled, self.recorder = experts, enabled, recorder
        self._layers: dict[int, LayerLoad] = {}

    def record(self, layer: int, routing: Routing, batch: ExpertBatch) -> None:
        """Count one pass through a layer, if enabled."""
        if self.recorder:
            self.recorder.record(layer, routing.expert_ids_TK)
        if not self.enabled:
            return
        ids = routing.expert_ids_TK.flatten()
        if layer not in self._layers:
            self._layers[layer] = LayerLoad(ids.new_zeros(self.experts))
        load = self._layers[layer]
        load.tokens_E.index_add_(0, ids, torch.ones_like(ids))
        load.rows += len(batch.rows_RD)

    def take(self) -> dict[int, LayerLoad]:
        """The counters of each layer since the last call."""
        taken, self._layers = self._layers, {}
        return taken


def imbalance(load_N: Tensor) -> float:
    """The largest load over the mean: 1 is even. 1 for no load at all."""
    mean = load_N.double().mean().item()
    return load_N.max().item() / mean if mean else 1.0
