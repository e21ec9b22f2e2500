"""How often a token of a recorded routing trace is copied, where the experts lie in order.

Shape legend: L MoE layers, T tokens, K top-k, E experts.
"""

from __future__ import annotations

import numpy as np

from soloist.placement.trace import Array, RoutingTrace
from soloist.specs.layout import Layout

MOST_TOKENS = 4096  # of the sample that are looked at


class TracedCopies:
    """Distinct nodes and distinct expert groups of a token, averaged over the tokens and layers of a trace.

    Raises ConfigurationError where the trace holds counts only.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        ids_LTK = trace.needed_sample.ids_LTK
        self.ids_LTK = ids_LTK[:, :: -(-ids_LTK.shape[1] // MOST_TOKENS)]
        self.experts = trace.model.experts
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    def of(self, layout: Layout, gpus_per_node: int) -> tuple[float, float] | None:
        """Nodes and groups; None where nothing is exchanged, or groups outnumber the experts and hold replicas."""
        if not 1 < layout.ep <= self.experts:
            return None
        key = (layout.ep, max(1, gpus_per_node // layout.tp))
        if key not in self._known:
            group_E = np.repeat(np.arange(layout.ep), np.diff(np.arange(layout.ep + 1) * self.experts // layout.ep))
            group_LTK = group_E[self.ids_LTK]
            self._known[key] = mean_distinct(group_LTK // key[1]), mean_distinct(group_LTK)
        return self._known[key]


def mean_distinct(values_LTK: Array) -> float:
    """Different values among the last dimension, on average."""
    ordered = np.sort(values_LTK, axis=-1)
    return float(1 + (np.diff(ordered, axis=-1) != 0).sum(axis=-1).mean())
