"""Small models and routings that the placement tests share."""

from __future__ import annotations

import numpy as np

from soloist.placement.placement import Placement
from soloist.placement.trace import RoutingTrace, Sample, TraceModel
from tests.specs.models import tiny_spec


def random_trace(experts: int = 6, top_k: int = 2, tokens: int = 20, seed: int = 0, topics: int = 0) -> RoutingTrace:
    """Routing of `tiny_spec`. With topics, experts of one topic are chosen together."""
    rng = np.random.default_rng(seed)
    scores_LTE = rng.random((2, tokens, experts)) * rng.random((2, 1, experts))
    if topics:
        topic_LE = rng.integers(topics, size=(2, 1, experts))
        scores_LTE += topic_LE == rng.integers(topics, size=(2, tokens, 1))
    ids_LTK = np.argsort(-scores_LTE, axis=2)[:, :, :top_k]
    length = max(1, tokens // 4)
    sequence_T, position_T = np.divmod(np.arange(tokens), length)
    sample = Sample(ids_LTK, rng.integers(11, size=tokens), sequence_T, position_T, sequence_T, position_T)
    return RoutingTrace.of_sample(TraceModel.of(tiny_spec(experts, top_k)), sample)


def random_placement(experts: int, groups: int, seed: int, layers: int = 2) -> Placement:
    """Every expert on one to three groups, which hold any number of them."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(layers):
        holders = [rng.permutation(groups)[: rng.integers(1, 4)] for _ in range(experts)]
        slots.append(tuple(tuple(e for e in range(experts) if g in holders[e]) for g in range(groups)))
    return Placement(experts=experts, slots=tuple(slots))
