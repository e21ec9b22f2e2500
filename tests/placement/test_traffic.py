from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.moe.router import Routing, SlotTable
from soloist.placement.placement import Placement
from soloist.placement.replicas import Closeness, turns
from soloist.placement.traffic import chosen_groups, measure
from tests.placement.cases import random_placement, random_trace, tiny_spec


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 5), nodes=st.integers(1, 3), top_k=st.integers(1, 4))
def test_rows_are_those_that_a_loop_counts(seed: int, groups: int, nodes: int, top_k: int) -> None:
    trace = random_trace(top_k=top_k, tokens=12, seed=seed)
    placement = random_placement(6, groups, seed)
    node_of_group = [g * nodes // groups for g in range(groups)]
    found = measure(placement, trace, node_of_group)
    sample, flat, hierarchical = trace.sample, 0, 0
    for layer in range(2):
        holders = placement.replicas(layer)
        tables = [turns(placement, layer, group, node_of_group)[0] for group in range(groups)]
        for t in range(12):
            own, index = int(sample.sequence_T[t] % groups), int(sample.index_T[t])
            taken = set()
            for expert in sample.ids_LTK[layer, t]:
                taken.add(int(tables[own][expert, (own + index) % tables[own].shape[1]]))
                assert taken <= {group for expert in sample.ids_LTK[layer, t] for group, _ in holders[expert]}
            flat += sum(node_of_group[g] != node_of_group[own] for g in taken)
            hierarchical += len({node_of_group[g] for g in taken} - {node_of_group[own]})
    assert found.cross_node_rows(hierarchical=False) == flat
    assert found.cross_node_rows(hierarchical=True) == hierarchical
    assert found.choices_LG.sum() == 2 * 12 * top_k


@pytest.mark.parametrize("seed", range(5))
def test_replicas_are_chosen_as_the_router_does(seed: int) -> None:
    trace, placement = random_trace(tokens=30, seed=seed), random_placement(6, 4, seed)
    index_T = np.arange(30)
    for layer, group in ((0, 1), (1, 3)):
        ids_TK = trace.sample.ids_LTK[layer]
        routing = Routing(torch.from_numpy(ids_TK.copy()), torch.ones(ids_TK.shape))
        nodes, closeness = (0, 0, 1, 1), Closeness.parse("4,2,1")
        expected = SlotTable(placement, layer, group, None, nodes, closeness).choose(routing).group_TK
        found = chosen_groups(placement, layer, ids_TK, np.full(30, group), index_T, nodes, closeness)
        assert np.array_equal(found, expected.numpy())


def test_peaks_are_one_for_even_traffic() -> None:
    """Every token of each of two nodes chooses one expert of each."""
    trace = random_trace(experts=2, top_k=2, tokens=16)
    traffic = measure(Placement.linear(tiny_spec(experts=2), 2), trace, [0, 1])
    assert traffic.fullest_nic(True) == traffic.fullest_nic(False) == traffic.fullest_group() == 1
    assert traffic.per_token(True) == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    trace = random_trace()
    with pytest.raises(ConfigurationError, match="trace is of tiny"):
        measure(Placement.linear(tiny_spec(experts=8), 2), trace, [0, 1])
    with pytest.raises(ConfigurationError, match="nodes"):
        measure(Placement.linear(tiny_spec(), 2), trace, [0, 0, 1])
    with pytest.raises(ConfigurationError, match="counts only"):
        measure(Placement.linear(tiny_spec(), 2), trace.keep(0), [0, 1])
