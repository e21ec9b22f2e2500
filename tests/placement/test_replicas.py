"""Which replica a token takes: the nearest, then the least loaded, or by weight; the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.replicas import TURNS, Closeness, turns
from tests.placement.cases import random_placement

# Expert 0 lies on groups 0, 1 and 3; 1 on 1 and 2; 2 on 2; 3 on 3.
PLACEMENT = Placement(experts=4, slots=(((0,), (0, 1), (1, 2), (0, 3)),))
NODES = (0, 0, 1, 1)


def shares(group: int, expert: int, **policy: object) -> dict[int, int]:
    """Turns of an expert that each group gets from tokens of `group`."""
    group_ET, _ = turns(PLACEMENT, 0, group, NODES, **policy)
    found, counts = np.unique(group_ET[expert], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def test_own_group_then_own_node_then_anywhere() -> None:
    assert shares(0, 0) == {0: TURNS}
    assert shares(2, 0) == {3: TURNS}  # its node's, though three groups hold it
    assert shares(0, 1) == {1: TURNS}
    assert set(shares(0, 3)) == {3}


def test_of_equally_near_ones_the_least_loaded_takes_more() -> None:
    """Expert 0 from a group without it on a node without it: groups 0 and 1 and 3 elsewhere."""
    placement = Placement(experts=3, slots=(((0, 1), (0,), (2,)),))
    group_ET, _ = turns(placement, 0, 2, (0, 0, 1))
    taken = np.bincount(group_ET[0], minlength=3)
    assert taken.sum() == TURNS
    assert taken[1] > taken[0] > 0 or taken[0] == 0  # group 1 holds nothing else
    even = np.bincount(turns(placement, 0, 2, (0, 0, 1), np.array([10.0, 0.0, 1.0]))[0][0], minlength=3)
    assert even.tolist() == [TURNS // 2, TURNS // 2, 0]


def test_weights_let_farther_ones_have_a_share() -> None:
    found = shares(0, 0, closeness=Closeness.parse("4,2,1"), load_E=np.array([100.0, 0, 0, 0]))
    assert found[0] > found[1] > found[3] > 0
    assert found[0] == pytest.approx(TURNS * 4 / 7, abs=2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 6), weights=st.sampled_from(["nearest", "4,2,1", "0,0,1"]))
def test_every_turn_names_a_slot_of_its_expert(seed: int, groups: int, weights: str) -> None:
    placement = random_placement(6, groups, seed)
    for group in range(groups):
        group_ET, slot_ET = turns(placement, 0, group, [g // 2 for g in range(groups)], None, Closeness.parse(weights))
        for expert, row in enumerate(zip(group_ET, slot_ET, strict=True)):
            assert all(placement.slots[0][g][s] == expert for g, s in zip(*row, strict=True))


@pytest.mark.parametrize("text", ["", "near", "1,2", "1,2,-3", "-1,2,3"])
def test_a_wrong_policy_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="replicas"):
        Closeness.parse(text)
