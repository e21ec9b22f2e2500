from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.planner.routing import (
    activated,
    busiest,
    distinct,
    highest,
    imbalance,
    limited_distinct,
    power_law_loads,
    straggler,
)


@pytest.mark.parametrize(("nodes", "wanted"), [(2, 1.99), (4, 3.61), (8, 5.30), (16, 6.52), (32, 7.27), (128, 7.89)])
def test_distinct_nodes_of_top_8_of_256(nodes: int, wanted: float) -> None:
    assert distinct(nodes, 256, 8) == pytest.approx(wanted, abs=0.05)


@given(st.sampled_from([2, 4, 8]), st.sampled_from([16, 64, 256]), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_distinct_groups_agree_with_drawing(groups: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(1)
    picks = rng.random((4000, experts)).argpartition(top_k, axis=1)[:, :top_k] * groups // experts
    counted = np.mean([len(set(row)) for row in picks.tolist()])
    assert distinct(groups, experts, top_k) == pytest.approx(counted, rel=0.05)


def test_groups_on_nodes_limit_the_distinct_nodes() -> None:
    """DeepSeek-V3: 8 groups of which 4 are kept; 3.63 nodes instead of 5.30 when a group is a node."""
    assert limited_distinct(8, 256, 8, 8, 4) == pytest.approx(3.63, abs=0.03)
    assert limited_distinct(4, 256, 8, 8, 4) < distinct(4, 256, 8)
    assert limited_distinct(8, 256, 8, 1, 1) == distinct(8, 256, 8)


def test_a_token_touches_its_top_k_and_a_batch_touches_all() -> None:
    assert activated(256, 256, 8, 1) == pytest.approx(8)
    assert activated(256, 256, 8, 10_000) == pytest.approx(256)
    assert activated(2, 2, 2, 1) == 2


def test_stragglers_shrink_with_rows() -> None:
    assert straggler(64, 128) > straggler(64, 1024) > 1
    assert straggler(1, 10) == 1


def test_of_two_ranks_each_has_what_the_other_lacks() -> None:
    """One token chooses two of sixteen experts: both are on one rank with a chance of 7 in 15."""
    assert busiest(8, 1.0, 2) == pytest.approx(1 + 7 / 15)
    rng = np.random.default_rng(0)
    on_first = np.array([(rng.choice(128, 9, replace=False) < 64).sum() for _ in range(4000)])
    assert busiest(64, 4.5, 2) == pytest.approx(np.maximum(on_first, 9 - on_first).mean(), rel=0.01)
    assert busiest(64, 4.2, 2) == pytest.approx(0.6 * busiest(64, 4.0, 2) + 0.4 * busiest(64, 4.5, 2))
    assert busiest(8, 8.0, 2) == busiest(8, 8.0, 1) == 8


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_fullest_rank_is_as_random_choices_have_it(ranks: int) -> None:
    pairs = np.random.default_rng(0).multinomial(200 * ranks, [1 / ranks] * ranks, size=2000)
    assert straggler(ranks, 200) == pytest.approx(pairs.max(axis=1).mean() / 200, rel=0.02)
    assert highest(1) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_power_law_shares_are_shares(alpha: float) -> None:
    loads = power_law_loads(alpha, 64, 4096)
    assert np.allclose(loads.sum(axis=1), 1)
    assert (loads >= 0).all()


def test_skew_hurts_more_the_wider_the_group_and_replicas_heal() -> None:
    assert imbalance(0.0, 256, 32, 8192) == 1
    assert 1 < imbalance(0.6, 256, 32, 8192) < imbalance(1.0, 256, 32, 8192) < imbalance(1.0, 256, 256, 8192)
    assert imbalance(1.0, 256, 32, 8192, replicas=32) < 1.2
    assert imbalance(1.0, 256, 288, 8192, replicas=32) > 1.5  # one slot a rank leaves nothing to pack
