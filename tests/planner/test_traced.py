from __future__ import annotations

import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.placement.trace import Array, RoutingTrace, Sample, TraceModel
from soloist.planner.routing import distinct
from soloist.planner.traced import TracedCopies
from soloist.specs.layout import Layout


def trace_of(ids_LTK: Array, experts: int) -> RoutingTrace:
    layers, tokens, top_k = ids_LTK.shape
    index_T, none_T = np.arange(tokens), np.zeros(tokens, np.int64)
    model = TraceModel(name="t", layers=layers, moe_layers=layers, experts=experts, top_k=top_k, d_model=8, vocab=9)
    return RoutingTrace.of_sample(model, Sample(ids_LTK, none_T, index_T, none_T, none_T, index_T))


def test_even_routing_is_what_the_formulas_say() -> None:
    ids_LTK = np.random.default_rng(0).random((2, 2000, 64)).argpartition(4, axis=2)[..., :4]
    copies = TracedCopies(trace_of(ids_LTK, 64))
    for layout, nodes, groups in (("ep16", 4, 16), ("ep8tp2", 4, 8), ("ep3", 1, 3)):
        found = copies.of(Layout.parse(layout), 4)
        assert found == pytest.approx((distinct(nodes, 64, 4), distinct(groups, 64, 4)), rel=0.03)


def test_neighbouring_experts_keep_a_token_on_one_node() -> None:
    first_LT1 = 4 * np.random.default_rng(0).integers(4, size=(1, 500, 1))
    copies = TracedCopies(trace_of(first_LT1 + np.arange(4), 16))
    assert copies.of(Layout.parse("ep16"), 4) == (1.0, 4.0)
    assert copies.of(Layout.parse("ep4"), 4) == (1.0, 1.0)


def test_where_there_is_nothing_to_count() -> None:
    trace = trace_of(np.zeros((1, 5, 1), np.int64), 4)
    for layout in ("tp2", "ep8"):
        assert TracedCopies(trace).of(Layout.parse(layout), 8) is None
    with pytest.raises(ConfigurationError, match="counts only"):
        TracedCopies(trace.keep(0))
